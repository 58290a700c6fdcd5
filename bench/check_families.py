"""LoRAs of every published size against every other, by `prolora check`.

    python bench/check_families.py

Bases are shapes alone. LoRAs are of four kinds: on attention, on all matrices of the blocks, on all
matrices, and on the first half of the blocks. Wrong is what fits another size with no word of its
own; exit code 1 if there is any.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

import torch

from prolora.adapters.lora import Lora
from prolora.architectures.families import find_title, known_families
from prolora.architectures.layouts import known_layouts, load_layout
from prolora.architectures.modules import find_block, is_attention, is_linear, matrix_shape
from prolora.bases import Base
from prolora.moving.base_fit import BaseMatch, fit_shapes


@dataclass(frozen=True)
class Shape:
    """A weight of which nothing but the shape is known."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    origin: None = None


def make_base(layout: str) -> Base:
    """A base of a published size."""
    shapes = load_layout(layout).shapes.items()
    return Base(layout, {name: Shape(f"{name}.weight", shape) for name, shape in shapes})


def list_kinds(layout: str) -> dict[str, list[str]]:
    """Kind -> the modules that a LoRA of it has."""
    shapes = load_layout(layout).shapes
    blocks = {n: at for n, s in shapes.items() if len(s) == 2 and (at := find_block(n))}
    every = Counter(stack for stack, _ in {at[:2] for at in blocks.values()})
    half = [n for n, at in blocks.items() if 2 * int(at.number) < every[at.stack]]
    return {
        "attention": [name for name in blocks if is_attention(name)],
        "blocks": list(blocks),
        "all": [n for n, s in shapes.items() if is_linear(n, s)],
        "half": half,
    }


def make_lora(layout: str, modules: list[str]) -> Lora:
    """A LoRA of rank 1 in diffusers' spelling; its factors share one number."""
    shapes, zero, tensors = load_layout(layout).shapes, torch.zeros(()), {}
    unet = any(one.unet and layout in one.layouts for one in known_families().values())
    part = "unet" if unet else "transformer"
    for name in modules:
        out, inputs = matrix_shape(shapes[name])
        tensors[f"{part}.{name}.lora_B.weight"] = zero.expand(out, 1)
        tensors[f"{part}.{name}.lora_A.weight"] = zero.expand(1, inputs)
    return Lora.open(tensors)


def judge(fit: BaseMatch, own: str) -> str:
    """What is told of another base."""
    if fit.answer != "fits":
        return fit.answer
    return "named" if find_title(own) in fit.also else "wrong"


def main() -> int:
    """Asks about all pairs, and prints what was told."""
    bases = {layout: make_base(layout) for layout in known_layouts()}
    told: Counter[tuple[str, str]] = Counter()
    for own in bases:
        for kind, modules in list_kinds(own).items():
            if not modules:
                continue
            lora = make_lora(own, modules)
            shapes = {n: matrix_shape(load_layout(own).shapes[n]) for n in modules}
            for number, (other, base) in enumerate(bases.items()):
                held = all(
                    n in base.shapes and matrix_shape(base.shapes[n]) == s
                    for n, s in shapes.items()
                )
                if not held and number % 8:  # what lacks a module cannot fit: an eighth shows it
                    told[kind, "lacks modules"] += 1
                    continue
                fit = fit_shapes(lora, base)
                verdict = judge(fit, own) if other != own else f"own {fit.answer}"
                told[kind, verdict] += 1
                if verdict == "wrong" or (verdict.startswith("own") and verdict != "own fits"):
                    print(kind, own, other, verdict, fit.sentence)
    for (kind, verdict), count in sorted(told.items()):
        print(f"{kind:10} {verdict:12} {count}")
    return 1 if any(verdict == "wrong" for _, verdict in told) else 0


if __name__ == "__main__":
    sys.exit(main())
