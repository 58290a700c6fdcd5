"""Targets made of the first terrain model, which try the constants that its child cannot try.

Drift between the two wheels is 0.3 %, which every rule copies. Merged LoRAs and another look move
the weights as far as targets of the other worlds did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from loras import draw_lessons
from network import Network
from world import Maps, change_answer

from prolora import LowRank

MERGED = {"merged": ("cratered", "terraced")}
"""Target -> ideas whose LoRAs are merged in; nothing is moved that learns one of them."""
FAR, LOOK, RATE = "far", "smoothed", 5e-4


def merge_loras(network: Network, loras: Sequence[Mapping[str, LowRank]]) -> None:
    """Adds updates to the weights."""
    with torch.no_grad():
        for lora in loras:
            for name, update in lora.items():
                weight = network.get_submodule(name).weight
                weight += update.dense().reshape(weight.shape)


def train_far(network: Network, maps: Maps, steps: int, batch: int) -> None:
    """Trains every weight towards another look."""
    lessons = draw_lessons(network, maps, 9, steps, batch)
    answers = [change_answer(network, LOOK, *lesson) for lesson in lessons]
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for (asked, _), wanted in zip(lessons, answers, strict=True):
        loss = (network(*asked) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.requires_grad_(False)
