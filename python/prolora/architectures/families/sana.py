"""Sana, 0.6B to 4.8B, and Sana Sprint. Programs know it by diffusers' names alone."""

from ..family import DIFFUSERS, PEFT, Family

FAMILY = Family(
    id="sana",
    title="Sana",
    layouts=("sana-0.6b", "sana-1.6b", "sana-4.8b", "sana-sprint-0.6b", "sana-sprint-1.6b"),
    spellings={"diffusers": DIFFUSERS, "peft": PEFT},
    claims={"sana": "Sana"},  # OneTrainer
)
