"""OmniGen2: Lumina 2's blocks, wider and more of them, and a second stack for images to edit.

ComfyUI and the trainers call the modules what the authors call them, which is what diffusers calls
Lumina 2's.
"""

from ..family import Family

FAMILY = Family(
    id="omnigen2",
    title="OmniGen2",
    layouts=("omnigen2",),
    claims={"omnigen2": "OmniGen2"},  # ai-toolkit
)
