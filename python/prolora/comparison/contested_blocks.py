"""Which of several similar blocks of the target a block of the source became, and what inserts are.

Models are made deeper by inserting blocks. LLaMA Pro (arXiv 2401.02415), and Anima 2.9B and 3.8B
after it, insert a copy of the block before, with the layers set to zero that write its result; then
they train. Leading subspaces of q, k and v can then be as near to the source as those of the block
that was there before. All attention matrices together tell the two apart, unless both are copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures.modules import is_attention
from ..bases import Base
from .transformer_blocks import Block

# A block whose score with a block of the source is below this share of another's is told from it.
CLEARLY_LESS = 0.8
# Of blocks with scores that are nearly equal one is told from the other if its weights are this
# much nearer; copies that were trained alike are not.
CLEARLY_NEARER = 0.9


@dataclass(frozen=True)
class Sides:
    """The blocks of two bases that may belong together.

    Attributes:
        source, target: the bases.
        ours, theirs: their blocks.
    """

    source: Base
    ours: list[Block]
    target: Base
    theirs: list[Block]


def settle_contests(
    pairs: Mapping[int, int], related: Tensor, sides: Sides
) -> tuple[dict[int, int], set[int]]:
    """({their block: our block}, their blocks that were chosen for coming first alone).

    A block of the target without a partner may resemble the partner of its neighbour nearly as well
    as the neighbour does. The nearest of them by all attention weights gets it; of equally near
    ones the first, since blocks are inserted behind those that they are copies of.

    Args:
        pairs: {their block: our block} by index, monotone.
        related: [our blocks, their blocks] scores, 0 where two blocks are not related.
        sides: the blocks.
    """
    settled: dict[int, int] = {}
    tied: set[int] = set()
    for index, origin in pairs.items():
        rivals = [
            j
            for j in _list_free_neighbours(index, pairs, sides.theirs)
            if float(related[origin, j]) > CLEARLY_LESS * float(related[origin, index])
            and j not in settled
        ]
        chosen = index
        if rivals:
            distances = {j: measure_distance(sides, origin, j) for j in sorted([index, *rivals])}
            least = min(distances.values())
            nearest = [j for j, d in distances.items() if least >= CLEARLY_NEARER * d]
            chosen = nearest[0]
            if len(nearest) > 1:
                tied.add(chosen)
        settled[chosen] = origin
    return settled, tied


def _list_free_neighbours(index: int, pairs: Mapping[int, int], theirs: list[Block]) -> list[int]:
    """The blocks without a partner that lie next to a block, in its stack, on both sides."""
    free: list[int] = []
    for step in (-1, 1):
        j = index + step
        while 0 <= j < len(theirs) and j not in pairs and theirs[j].place == theirs[index].place:
            free.append(j)
            j += step
    return free


def measure_distance(sides: Sides, ours: int, theirs: int) -> float:
    """Mean over attention matrices of ‖W_t − W_s‖ / √(‖W_t‖² + ‖W_s‖²): 0 equal, 1 as unrelated.

    Where blocks have no attention, the mean is over all matrices.
    """
    one, other = sides.ours[ours], sides.theirs[theirs]
    names = [name for name, shape in other.shapes.items() if one.shapes.get(name) == shape]
    names = [name for name in names if is_attention(name)] or names
    distances = []
    for name in names:
        a = sides.source.read(f"{one.name}.{name}").to(torch.float32)
        b = sides.target.read(f"{other.name}.{name}").to(torch.float32).reshape(a.shape)
        squares = a.square().sum(dtype=torch.float64) + b.square().sum(dtype=torch.float64)
        between = (b - a).square().sum(dtype=torch.float64)
        distances.append(float((between / squares.clamp_min(1e-300)).sqrt()))
    return sum(distances) / max(1, len(distances))


def find_resembled(scores: Tensor, related: Tensor, index: int) -> int | None:
    """Our block that their block without a partner resembles most, None if it resembles none."""
    best = int(scores[:, index].argmax())
    return best if float(related[best, index]) > 0 else None
