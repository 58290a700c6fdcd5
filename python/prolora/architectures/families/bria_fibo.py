"""Bria FIBO: as FLUX.1, but every block reads another layer of the text encoder.

Programs know it by diffusers' names alone.
"""

from ..family import DIFFUSERS, PEFT, Family

FAMILY = Family(
    id="bria-fibo",
    title="Bria FIBO",
    layouts=("bria-fibo",),
    spellings={"diffusers": DIFFUSERS, "peft": PEFT},
)
