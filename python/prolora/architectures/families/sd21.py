"""Stable Diffusion 2.x and what was trained from it."""

from ..family import SPELLINGS, Family, Spelling

FAMILY = Family(
    id="sd21",
    title="Stable Diffusion 2.1",
    layouts=("sd21",),
    spellings={
        **SPELLINGS,
        "kohya": Spelling("lora_unet_", "diffusers", dotted=False),
        "diffusers": Spelling("unet.", "diffusers"),
    },
    claims={
        "sd_v2": "Stable Diffusion 2.x",  # sd-scripts, and below
        "stable-diffusion-v2": "Stable Diffusion 2.x",
        "sd_2.1": "Stable Diffusion 2.1",  # ai-toolkit
    },
    unet=True,
)
