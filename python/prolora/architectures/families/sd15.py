"""Stable Diffusion 1.x and what was trained from it."""

from ..family import SPELLINGS, UNET, UNET_KOHYA, Family

FAMILY = Family(
    id="sd15",
    title="Stable Diffusion 1.5",
    layouts=("sd15",),
    spellings={**SPELLINGS, "kohya": UNET_KOHYA, "diffusers": UNET},
    claims={
        "sd_v1": "Stable Diffusion 1.x",  # sd-scripts, and below
        "stable-diffusion-v1": "Stable Diffusion 1.x",
        "sd_1.5": "Stable Diffusion 1.5",  # ai-toolkit
    },
    unet=True,
)
