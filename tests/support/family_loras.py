"""LoRAs of rank 1 over the first two blocks of every list of a family's modules."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import is_linear
from prolora.core.lowrank import LowRank

_BLOCK = re.compile(r"(?:^|\.)\w*(?:blocks?(?:\.[a-z_]+)?|layers|refiner)\.(\d+)\.")


def is_early(module: str, blocks: int = 2) -> bool:
    """Whether a module lies in a block, and in one of the first of its list."""
    number = _BLOCK.search(module)
    return number is not None and int(number[1]) < blocks


def make_updates(
    layout: str, keep: Callable[[str], bool] = lambda module: True
) -> dict[str, LowRank]:
    """Canonical module -> an update, for the linear layers of the first blocks."""
    generator = torch.Generator().manual_seed(len(layout))
    updates = {}
    for name, shape in load_layout(layout).shapes.items():
        if is_linear(name, shape) and is_early(name) and keep(name):
            up = torch.randn(shape[0], 1, generator=generator)
            updates[name] = LowRank(up, torch.randn(1, shape[1], generator=generator))
    return updates


def measure_difference(one: LowRank, other: LowRank) -> float:
    """‖one - other‖ ÷ ‖other‖, in double precision and without either product."""
    both = LowRank(
        torch.cat([one.up.double(), -other.up.double()], 1),
        torch.cat([one.down.double(), other.down.double()]),
    )
    return float(both.norm()) / float(other.norm())
