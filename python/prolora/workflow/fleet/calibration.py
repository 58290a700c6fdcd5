"""How fast this machine reads, checks and writes LoRAs: what a plan's estimates are made of."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ... import adapters
from ...adapters.adapter import Adapter
from ...core.lowrank import LowRank

_MODULE = "down_blocks.1.attentions.0.transformer_blocks.{}.attn1.to_q"

_MANY = 32


@dataclass(frozen=True)
class Rates:
    """What the estimates of a plan are made of.

    Attributes:
        per_byte: seconds to read, hash, write and compare a byte of a LoRA.
        per_module: seconds for a module of a LoRA, whatever its size.
        per_operation: seconds for a multiplication and an addition in float32.
    """

    per_byte: float
    per_module: float
    per_operation: float


def calibrate() -> Rates:
    """Measures this machine, in less than a second; files are written where temporary ones are."""
    with tempfile.TemporaryDirectory(prefix="prolora-") as name:
        few, many = _make_adapter(2, 1024, 256), _make_adapter(_MANY, 16, 4)
        folder = Path(name)
        large, small = (_time(partial(_pass, a, folder)) for a in (few, many))
    per_module = small / _MANY
    size = sum(4 * (x.up.numel() + x.down.numel()) for x in few.updates.values())
    matrix = torch.ones(512, 512)
    return Rates(
        per_byte=max(large - 2 * per_module, large / 10) / size,
        per_module=per_module,
        per_operation=_time(lambda: matrix @ matrix) / 512**3,
    )


def _make_adapter(modules: int, width: int, rank: int) -> Adapter:
    update = LowRank(torch.ones(width, rank), torch.ones(rank, width))
    return Adapter({_MODULE.format(i): update for i in range(modules)})


def _pass(adapter: Adapter, folder: Path) -> None:
    """Writes an adapter, compares what was written, and reads it."""
    path = folder / "lora.safetensors"
    adapters.write_adapter(adapter, path)
    adapters.read_adapter(path)


def _time(work: Callable[[], object]) -> float:
    """Seconds of the fastest of three runs."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
