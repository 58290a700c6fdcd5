"""Stable Diffusion XL, Pony, Illustrious, NoobAI and its students of few steps."""

from ..family import SPELLINGS, UNET, Family

FAMILY = Family(
    id="sdxl",
    title="Stable Diffusion XL",
    layouts=("sdxl",),
    spellings={**SPELLINGS, "diffusers": UNET},
    claims={
        "sdxl": "Stable Diffusion XL",  # sd-scripts, ai-toolkit, OneTrainer
        "stable-diffusion-xl": "Stable Diffusion XL",
    },
    unet=True,
)
