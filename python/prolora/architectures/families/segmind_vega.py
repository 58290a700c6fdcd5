"""Segmind-Vega: a student of SDXL with still fewer blocks than SSD-1B."""

from ..family import SPELLINGS, Family, Spelling

FAMILY = Family(
    id="segmind-vega",
    title="Segmind-Vega",
    layouts=("segmind-vega",),
    spellings={
        **SPELLINGS,
        "diffusers": Spelling("unet.", "diffusers"),
    },
    claims={"vega": "Segmind-Vega"},  # ai-toolkit
    unet=True,
)
