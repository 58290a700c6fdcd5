"""Stable Diffusion 2.x and what was trained from it."""

from ..family import SPELLINGS, UNET, UNET_KOHYA, Family

FAMILY = Family(
    id="sd21",
    title="Stable Diffusion 2.1",
    layouts=("sd21",),
    spellings={**SPELLINGS, "kohya": UNET_KOHYA, "diffusers": UNET},
    claims={
        "sd_v2": "Stable Diffusion 2.x",  # sd-scripts, and below
        "stable-diffusion-v2": "Stable Diffusion 2.x",
        "sd_2.1": "Stable Diffusion 2.1",  # ai-toolkit
    },
    unet=True,
)
