"""LLaDA-Image: Z-Image's blocks, trained from nothing, and a stream of semantic features."""

from ..family import COMFY, KOHYA, Family

FAMILY = Family(
    id="llada-image",
    title="LLaDA-Image",
    layouts=("llada-image",),
    spellings={"comfy": COMFY, "kohya": KOHYA},
    rarer_than="z-image",
)
