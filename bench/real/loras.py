"""Trains the terrain study's LoRAs with PEFT; on the target base such a LoRA is the oracle."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from contenders import Updates
from network import Network
from torch import Tensor, nn
from training import train_factors
from world import Batch, Maps, ask_base, change_answer

LINEAR = r".*\.(qkv|proj_out|emb_layers\.1|skip_connection)"
CONVOLUTIONS = r".*\.(qkv|proj_out|emb_layers\.1|skip_connection|in_layers\.2|out_layers\.3)"
ADAPTERS = {"lora-4": (LINEAR, 4), "lora-16": (LINEAR, 16), "locon-16": (CONVOLUTIONS, 16)}
"""Adapter -> (its modules, rank); the first two have no convolutions but those of 1×1."""
RATE = 2e-3


def train_lora(
    base: Network, maps: Maps, idea: str, adapter: str, seed: int, steps: int, batch: int
) -> Updates:
    """A LoRA of an idea; its scale is 1, as α is the rank."""

    def losses(model: nn.Module) -> Iterator[Tensor]:
        for asked, answer in draw_lessons(base, maps, seed, steps, batch):
            wanted = change_answer(base, idea, asked, answer)
            yield (model(*asked) - wanted).square().mean()

    return train_factors(base, *ADAPTERS[adapter], seed, losses, (RATE, steps))


@functools.lru_cache(maxsize=4)
def draw_lessons(
    base: Network, maps: Maps, seed: int, steps: int, batch: int
) -> list[tuple[Batch, torch.Tensor]]:
    """[(what is asked, what the base answers)]: the same ones for every idea."""
    generator = torch.Generator().manual_seed(5000 + seed)
    asked = [maps.draw(False, batch, generator) for _ in range(steps)]
    return [(one, ask_base(base, one)) for one in asked]
