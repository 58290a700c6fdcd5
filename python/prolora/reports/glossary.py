"""What the words in tables, pages and reports mean: every term is explained here, and only here."""

from __future__ import annotations

GLOSSARY = {
    "source": "the model that the LoRA was trained on",
    "target": "the model that it moves to",
    "update": "what a LoRA adds to one weight of the model, ΔW",
    "kept": "share of the update's energy ‖ΔW‖² that is on the target",
    "vs copy": "distance to the unchanged update, in units of its norm",
    "norm": "ratio of the norms of the update, target to source",
    "drift": "‖W_t − W_s‖/‖W_s‖ of the two models' weights: 0 if equal, 1.4 if trained apart",
    "cosine": "⟨W_s, W_t⟩/(‖W_s‖‖W_t‖) of the two models' weights: 1 if equal, 0 if trained apart",
    "Φ": "overlap of the leading subspaces of the two models' weights, left and right, 0 … 1",
    "chance": "the Φ that unrelated weights have",
    "above": "the lesser Φ over chance: 0 as unrelated, 1 as equal weights",
    "mixed": "share of the energy in the update's mixed blocks, which projecting drops",
    "angle": (
        "the median … the largest angle between the leading subspaces, on the side that is farther "
        "apart"
    ),
    "energy": "share of ‖ΔW‖², which says how much an update does",
    "k": "number of leading columns that are compared",
    "held": "share of the weights' Σσ² in these columns",
    "whole": "pairs of weights that have no more than k columns",
    "≥": "pairs whose Φ reaches that number on both sides",
    "score": "how alike the paired blocks are",
    "margin": "the lead of the score over the second best block",
    "by depth": "a bar for each block, the tallest for the largest drift",
    "cosine of updates": "⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖‖ΔW_b‖) of two LoRAs: 1 if equal, −1 if opposite",
    "write alike": "overlap Φ of the directions that two LoRAs write, 0 … 1",
    "read alike": "overlap Φ of the directions that two LoRAs read, 0 … 1",
    "cancel": "modules in which two LoRAs work against each other",
    "double": "modules in which two LoRAs do the same thing",
    "strangers": "blocks whose weights have nothing in common with those of their partners",
}
"""Term -> what it means."""
