"""KOALA: students of SDXL with half as many layers and fewer blocks."""

from ..family import Family

FAMILY = Family(
    id="koala",
    title="KOALA",
    layouts=("koala-1b", "koala-700m"),
    unet=True,
)
