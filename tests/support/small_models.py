"""A small model of any family: its names and proportions, two blocks a list, 1/32 of its width."""

import re

import torch

from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout

SHRINK = 32


def small_shapes(layout, blocks=2):
    """{canonical module: shape}; matrices only."""
    matrices = {n: s for n, s in load_layout(layout).shapes.items() if len(s) == 2}
    first = [n for n in matrices if all(int(i) < blocks for i in _numbers(n)[:1])]
    # A module that only a later block has, as the last one of some families.
    kinds = set(map(_kind, first))
    own = {_kind(n): n for n in matrices if _kind(n) not in kinds}
    return {
        name: tuple(max(4, size // SHRINK) for size in matrices[name])
        for name in (*first, *own.values())
    }


def _numbers(name):
    return re.findall(r"\.(\d+)\.", name)


def _kind(name):
    return re.sub(r"\.\d+\.", ".N.", name, count=1)


def small_weights(layout, seed=0, drift=0.0, blocks=2):
    """{canonical module: weight}, the source's plus a share of noise of the same size."""
    generator, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 99)
    weights = {}
    for name, shape in small_shapes(layout, blocks).items():
        weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        change = torch.randn(shape, generator=noise) / shape[1] ** 0.5
        weights[name] = weight + drift * change
    return weights


def authors_weights(family_id, weights):
    """The same weights under the authors' names, fused and swapped as they have them."""
    family = known_families()[family_id]
    wholes = {}
    for name in weights:
        weight = family.find_weight_holding(name)
        wholes[weight.name] = weight
    out = {}
    for name, weight in wholes.items():
        rows = torch.cat([weights[part] for part in weight.parts])
        if weight.is_swapped(tuple(rows.shape)):
            rows = torch.cat(rows.chunk(2)[::-1])
        out[name] = rows
    return out
