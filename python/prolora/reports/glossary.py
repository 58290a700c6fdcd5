"""What the words in tables, pages and reports mean: every term is explained here, and only here."""

from __future__ import annotations

GLOSSARY = {
    "target": "the model that it moves to",
    "kept": "share of the update's energy ‖ΔW‖² that is on the target",
    "vs copy": "distance to the unchanged update, in units of its norm",
    "norm": "ratio of the norms of the update, target to source",
    "drift": "‖W_t − W_s‖/‖W_s‖ of the two models' weights: 0 if equal, 1.4 if trained apart",
    "Φ": "overlap of the leading subspaces of the two models' weights, left and right, 0 … 1",
    "above": "the lesser Φ over chance: 0 as unrelated, 1 as equal weights",
    "mixed": "share of the energy in the update's mixed blocks, which projecting drops",
    "angle": (
        "the median … the largest angle between the leading subspaces, on the side that is farther "
        "apart"
    ),
    "energy": "share of ‖ΔW‖², which says how much an update does",
    "score": "how alike the paired blocks are",
    "margin": "the lead of the score over the second best block",
    "cosine of updates": "⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖‖ΔW_b‖) of two LoRAs: 1 if equal, −1 if opposite",
    "write alike": "overlap Φ of the directions that two LoRAs write, 0 … 1",
    "read alike": "overlap Φ of the directions that two LoRAs read, 0 … 1",
    "cancel": "modules in which two LoRAs work against each other",
    "double": "modules in which two LoRAs do the same thing",
}
"""Term -> what it means."""
