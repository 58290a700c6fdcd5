"""Stable Diffusion XL, Pony, Illustrious, NoobAI and its students of few steps."""

from ..family import SPELLINGS, Family, Spelling

FAMILY = Family(
    id="sdxl",
    title="Stable Diffusion XL",
    layouts=("sdxl",),
    spellings={
        **SPELLINGS,
        "diffusers": Spelling("unet.", "diffusers"),
    },
    claims={
        "sdxl": "Stable Diffusion XL",  # sd-scripts, ai-toolkit, OneTrainer
        "stable-diffusion-xl": "Stable Diffusion XL",
    },
    siblings=("SDXL, Pony, Illustrious and NoobAI, and its students of few steps",),
    unet=True,
)
