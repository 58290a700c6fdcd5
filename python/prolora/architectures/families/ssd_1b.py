"""SSD-1B: a student of SDXL with fewer blocks."""

from ..family import SPELLINGS, UNET, Family

FAMILY = Family(
    id="ssd-1b",
    title="SSD-1B",
    layouts=("ssd-1b",),
    spellings={**SPELLINGS, "diffusers": UNET},
    claims={"ssd": "SSD-1B"},  # ai-toolkit
    unet=True,
    rarer_than="sdxl",
)
