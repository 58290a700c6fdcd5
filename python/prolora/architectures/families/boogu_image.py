"""Boogu-Image: OmniGen2's blocks, and before them blocks of two streams.

ComfyUI and the trainers call the modules what the authors call them.
"""

from ..family import Family

FAMILY = Family(
    id="boogu-image",
    title="Boogu-Image",
    layouts=("boogu-image",),
    claims={"boogu_image": "Boogu-Image"},  # ai-toolkit
)
