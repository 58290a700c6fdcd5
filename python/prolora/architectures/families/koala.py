"""KOALA: students of SDXL with half as many layers and fewer blocks."""

from ..family import SPELLINGS, Family, Spelling

FAMILY = Family(
    id="koala",
    title="KOALA",
    layouts=("koala-1b", "koala-700m"),
    spellings={
        **SPELLINGS,
        "diffusers": Spelling("unet.", "diffusers"),
    },
    readers={
        "ComfyUI": ("comfy", "kohya"),
    },
    unet=True,
)
