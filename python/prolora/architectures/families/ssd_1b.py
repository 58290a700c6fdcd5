"""SSD-1B: a student of SDXL with fewer blocks."""

from ..family import SPELLINGS, Family, Spelling

FAMILY = Family(
    id="ssd-1b",
    title="SSD-1B",
    layouts=("ssd-1b",),
    spellings={
        **SPELLINGS,
        "diffusers": Spelling("unet.", "diffusers"),
    },
    claims={"ssd": "SSD-1B"},  # ai-toolkit
    unet=True,
)
