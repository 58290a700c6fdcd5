"""Damping from thin factors against the factorisation: processor seconds in alternation.

    python bench/damping_cost.py [--repeats 5] [--out bench/results/damping_cost.json]

The baseline is `Damper` without a number of columns, which forms and factorises the Gram matrix of
each drift, as it did for every update before. Spectra and sizes are those of bench/sdxl.py; the
last row of a rank weighs the shapes as SSD-1B's attention has them. Ratios of minima, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sdxl
import torch
from torch import Tensor

import prolora
from prolora.core import damping
from prolora.core.damping import Damper

KAPPA = 2.2  # what `auto` chooses for these bases
RANKS = (8, 16, 32)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    torch.set_num_threads(1)
    counts = Counter(sdxl.shapes("ssd-1b", 1, False).values())
    rows = []
    for rank in RANKS:
        parts = [compare(shape, rank, words.repeats) for shape in counts]
        thin, dense = (
            sum(part[name] * counts[tuple(part["shape"])] for part in parts)
            for name in ("thin, s", "factorised, s")
        )
        rows += [*parts, {"shape": "SSD-1B", "rank": rank, "ratio": round(thin / dense, 3)}]
    result = {"kappa": KAPPA, "torch": torch.__version__, "repeats": words.repeats, "rows": rows}
    if words.out:
        words.out.write_text(json.dumps(result, indent=1) + "\n")


def compare(shape: tuple[int, int], rank: int, repeats: int) -> dict[str, Any]:
    """Both ways for one pair of weights, and how far their results are apart."""
    source, target = (sdxl.weight("a.to_q", shape, noise, 0).half() for noise in (0.0, sdxl.NOISE))
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(m, rank, generator=generator) * torch.arange(1, rank + 1).rsqrt()
    delta = prolora.LowRank(up, torch.randn(rank, n, generator=generator))
    calls: dict[str, Callable[[], prolora.LowRank]] = {
        "thin": lambda: Damper(source, target, columns=rank).at(KAPPA)(delta),
        "factorised": lambda: Damper(source, target).at(KAPPA)(delta),
    }
    taken = dict.fromkeys(calls, math.inf)
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.process_time()
            call()
            taken[name] = min(taken[name], time.process_time() - began)
    thin, dense = (call().dense() for call in calls.values())
    row = {
        "shape": list(shape),
        "rank": rank,
        "rounds allowed": damping.count_rounds(shape, rank),
        "thin, s": taken["thin"],
        "factorised, s": taken["factorised"],
        "ratio": round(taken["thin"] / taken["factorised"], 3),
        "difference": distance(thin, dense),
    }
    print(json.dumps(row), flush=True)
    return row


def distance(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖."""
    return float((one - other).double().norm() / other.double().norm())


if __name__ == "__main__":
    main()
