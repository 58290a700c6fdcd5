"""Segmind-Vega: a student of SDXL with still fewer blocks than SSD-1B."""

from ..family import Family

FAMILY = Family(
    id="segmind-vega",
    title="Segmind-Vega",
    layouts=("segmind-vega",),
    claims={"vega": "Segmind-Vega"},  # ai-toolkit
    unet=True,
)
