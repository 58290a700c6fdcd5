"""LLaDA-Image: Z-Image's blocks, trained from nothing, and a stream of semantic features.

No trainer writes LoRAs for it yet, so that a LoRA on Z-Image's blocks alone is taken for one of
Z-Image.
"""

from ..family import COMFY, KOHYA, Family

FAMILY = Family(
    id="llada-image",
    title="LLaDA-Image",
    layouts=("llada-image",),
    spellings={"comfy": COMFY, "kohya": KOHYA},
    rarer_than="z-image",
)
