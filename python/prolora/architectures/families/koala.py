"""KOALA: students of SDXL with half as many layers and fewer blocks."""

from ..family import PEFT, Family, Spelling

FAMILY = Family(
    id="koala",
    title="KOALA",
    layouts=("koala-1b", "koala-700m"),
    # The authors' numbers of ComfyUI count one layer a block here, and no reader of ours does.
    spellings={
        "kohya": Spelling("lora_unet_", "diffusers", dotted=False),
        "diffusers": Spelling("unet.", "diffusers"),
        "peft": PEFT,
    },
    unet=True,
)
