"""Mage-Flow: Qwen-Image's blocks, twelve of them, on latents that are not packed.

Its authors withdrew it; people have copies.
"""

from ..family import Family

FAMILY = Family(
    id="mageflow",
    title="Mage-Flow",
    layouts=("mageflow",),
    rarer_than="qwen-image",
    claims={"mageflow": "Mage-Flow"},  # ai-toolkit
)
