"""Whether the blocks of a deepened Anima are recognised, by how blocks were inserted and drift.

    python bench/anima_depth.py --json bench/results/anima_depth.json

Anima has 28 blocks, Anima 2.9B 40: blocks were inserted at the numbers of `INSERTED`. Here are
pairs of generated models with Anima's names, at a small width, and the map that `match_blocks`
finds for them:

- copy: an inserted block is a copy of the block before it;
- zeroed copy: the same with the layers set to zero that write its result, as in LLaMA Pro;
- mixture: the mean of the blocks before and behind it;
- fresh: weights of its own.

In real models the blocks of one stack are a little alike: `alike` is the share of its energy that a
weight has in common with those of all other blocks. Anima 3.8B has 52 blocks: by public converters
12 were inserted into Anima 2.9B, at the numbers of `INSERTED_52`.

After the insertion every weight of every block drifts by a share of its norm: by noise of full
rank, or by a matrix of few directions. A weight that was set to zero drifts as the one it was.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import find_block
from prolora.bases import open_base
from prolora.comparison.block_matching import match_blocks

STACK = "transformer_blocks"
INSERTED = (2, 5, 8, 11, 14, 17, 21, 24, 27, 30, 33, 36)
"""The inserted blocks of Anima 2.9B, in its own numbers."""
INSERTED_52 = (3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47)
"""Those of Anima 3.8B between the blocks of Anima 2.9B."""
SIZES = {"anima": INSERTED, "anima-2.9b": INSERTED_52}
INSERTIONS = ("copy", "zeroed copy", "mixture", "fresh")
DRIFTS = {
    "noise": (0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0),
    "low rank": (0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0),
}
FEW_DRIFTS = (0.1, 0.5, 1.0, 2.0)
ALIKE = (0.1, 0.3, 0.5)
NARROWER = 32
"""The width of Anima over that of the generated models."""
WRITING = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
Weights = dict[str, Tensor]


def shrink_shapes(id_: str, narrower: int = NARROWER) -> dict[str, tuple[int, ...]]:
    """Module -> shape of the main blocks of a layout, at a fraction of its width."""
    return {
        name: tuple(size // narrower if size % narrower == 0 else size for size in shape)
        for name, shape in load_layout(id_).shapes.items()
        if name.startswith(f"{STACK}.")
    }


def make_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A weight [m, n] of norm √(mn) with singular values that fall as i^-1/2."""
    m, n = shape
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in (m, n))
    sigma = torch.arange(1, k + 1).float().rsqrt()
    return (u * sigma) @ v.T * ((m * n) ** 0.5 / sigma.norm())


def make_noise(name: str, shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """A matrix [m, n] of norm √(mn): of all directions, or of a sixteenth of them."""
    m, n = shape
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {kind} {name}".encode()))
    if kind == "noise":
        noise = torch.randn(m, n, generator=generator)
    else:
        r = max(1, min(m, n) // 16)
        noise = torch.randn(m, r, generator=generator) @ torch.randn(r, n, generator=generator)
    return noise * ((m * n) ** 0.5 / noise.norm())


def list_origins(blocks: int, inserted: Iterable[int]) -> dict[int, int | None]:
    """Block of the deeper model -> block of the source that it was, None if it was inserted."""
    new = set(inserted)
    left = iter(range(blocks))
    return {j: None if j in new else next(left) for j in range(blocks + len(new))}


def make_pair(
    insertion: str,
    drift: float,
    kind: str,
    seed: int,
    *,
    source: str = "anima",
    alike: float = 0.0,
    narrower: int = NARROWER,
) -> tuple[Weights, Weights, dict[str, str | None]]:
    """(source, deeper model, {its block: the source's block or None if it was inserted})."""
    shapes = shrink_shapes(source, narrower)
    places = {name: block for name in shapes if (block := find_block(name))}
    weights = {
        name: (1 - alike) ** 0.5 * make_weight(name, shape, seed)
        + alike**0.5 * make_weight(f"of all {places[name].local}", shape, seed)
        for name, shape in shapes.items()
    }
    blocks = 1 + max(int(block.number) for block in places.values())
    locals_ = list(dict.fromkeys(block.local for block in places.values()))
    origins = list_origins(blocks, SIZES[source])
    target: Weights = {}
    before = 0
    for j, origin in origins.items():
        before = before if origin is None else origin
        behind = min(blocks - 1, before + 1)
        for local in locals_:
            name = f"{STACK}.{j}.{local}"
            one, two = (weights[f"{STACK}.{i}.{local}"] for i in (before, behind))
            if origin is not None or insertion == "copy":
                start = one
            elif insertion == "zeroed copy":
                start = torch.zeros_like(one) if local in WRITING else one
            elif insertion == "mixture":
                start = (one + two) / 2
            else:
                start = make_weight(f"fresh {name}", tuple(one.shape), seed)
            target[name] = start + drift * make_noise(name, tuple(one.shape), kind, seed)
    truth = {
        f"{STACK}.{j}": None if origin is None else f"{STACK}.{origin}"
        for j, origin in origins.items()
    }
    return weights, target, truth


def measure_case(
    insertion: str,
    drift: float,
    kind: str,
    seeds: Iterable[int],
    *,
    source: str = "anima",
    alike: float = 0.0,
) -> dict[str, object]:
    """What is found in pairs of one kind."""
    right = wrong = declined = invented = tied = total = 0
    least = 1.0
    for seed in seeds:
        old, new, truth = make_pair(insertion, drift, kind, seed, source=source, alike=alike)
        for decision in match_blocks(open_base(old), open_base(new)).decisions:
            wanted = truth[decision.target]
            total += 1
            tied += decision.tied
            if wanted is None:
                invented += decision.source is not None
            elif decision.source == wanted:
                right += 1
                least = min(least, decision.score)
            else:
                wrong += decision.source is not None
                declined += decision.source is None
    return {
        "source": source,
        "insertion": insertion,
        "alike": alike,
        "drift_kind": kind,
        "drift": drift,
        "blocks": total,
        "right": right,
        "declined": declined,
        "wrong": wrong,
        "inserted_taken_for_an_old_one": invented,
        "chosen_for_coming_first": tied,
        "least_score_of_a_right_one": round(least, 3),
    }


def list_cases() -> list[dict[str, Any]]:
    """What is measured: 28 to 40 blocks under all drifts, alike blocks and 40 to 52 under some."""
    every = [(kind, drift) for kind, drifts in DRIFTS.items() for drift in drifts]
    few = [("noise", drift) for drift in FEW_DRIFTS]
    settings: list[tuple[dict[str, Any], list[tuple[str, float]]]] = [
        ({}, every),
        ({"source": "anima-2.9b"}, few),
        *(({"alike": alike}, few) for alike in ALIKE),
    ]
    return [
        {"insertion": insertion, "kind": kind, "drift": drift, **setting}
        for setting, drifts in settings
        for insertion in INSERTIONS
        for kind, drift in drifts
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for case in list_cases():
        rows.append(measure_case(seeds=range(given.seeds), **case))
        print(*rows[-1].values(), sep="\t", flush=True)
    if given.json:
        record = {"inserted": SIZES, "narrower": NARROWER, "seeds": given.seeds, "rows": rows}
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
