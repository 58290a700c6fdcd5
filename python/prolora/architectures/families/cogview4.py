"""CogView4: text to image. Programs know it by diffusers' names alone."""

from ..family import DIFFUSERS, PEFT, Family

FAMILY = Family(
    id="cogview4",
    title="CogView4",
    layouts=("cogview4",),
    spellings={"diffusers": DIFFUSERS, "peft": PEFT},
)
