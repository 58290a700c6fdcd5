"""Mage-Flow: Qwen-Image's blocks, twelve of them, on latents that are not packed."""

from ..family import Family

FAMILY = Family(
    id="mageflow",
    title="Mage-Flow",
    layouts=("mageflow",),
    claims={"mageflow": "Mage-Flow"},  # ai-toolkit
)
