"""Targets made of the first terrain model, which try the constants that its child cannot try.

Drift between the two wheels is 0.3 %, which every rule copies. Merged LoRAs and another look move
the weights two to three times as far.
"""

from __future__ import annotations

from loras import draw_lessons
from network import Network
from training import descend
from world import Maps, change_answer

MERGED = {"merged": ("cratered", "terraced")}
"""Target -> ideas whose LoRAs are merged in; nothing is moved that learns one of them."""
FAR, LOOK, RATE = "far", "smoothed", 5e-4


def train_far(network: Network, maps: Maps, steps: int, batch: int) -> None:
    """Trains every weight towards another look."""
    lessons = draw_lessons(network, maps, 9, steps, batch)
    answers = [change_answer(network, LOOK, *lesson) for lesson in lessons]
    network.requires_grad_(True)
    pairs = zip(lessons, answers, strict=True)
    losses = ((network(*asked) - wanted).square().mean() for (asked, _), wanted in pairs)
    descend([*network.parameters()], losses, RATE, steps)
    network.requires_grad_(False)
