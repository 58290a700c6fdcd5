"""Segmind-Vega: a student of SDXL with still fewer blocks than SSD-1B."""

from ..family import SPELLINGS, UNET, Family

FAMILY = Family(
    id="segmind-vega",
    title="Segmind-Vega",
    layouts=("segmind-vega",),
    spellings={**SPELLINGS, "diffusers": UNET},
    claims={"vega": "Segmind-Vega"},  # ai-toolkit
    unet=True,
    rarer_than="sdxl",
)
