"""KOALA: students of SDXL with half as many layers and fewer blocks."""

from ..family import PEFT, UNET, UNET_KOHYA, Family

FAMILY = Family(
    id="koala",
    title="KOALA",
    layouts=("koala-1b", "koala-700m"),
    # The authors' numbers of ComfyUI count one layer a block here, and no reader of ours does.
    spellings={"kohya": UNET_KOHYA, "diffusers": UNET, "peft": PEFT},
    unet=True,
    rarer_than="sdxl",
)
