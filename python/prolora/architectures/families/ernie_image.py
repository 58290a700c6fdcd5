"""ERNIE-Image and its distillation Turbo. The authors use diffusers' names."""

from ..family import Family

FAMILY = Family(
    id="ernie-image",
    title="ERNIE-Image",
    layouts=("ernie-image",),
    claims={"ernie": "ERNIE-Image"},  # OneTrainer; ai-toolkit writes "ernie_image"
)
