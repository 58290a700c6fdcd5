"""Updates of the authors' fused weights <-> updates of their parts.

The parts are rows of the fused weight. prolora moves parts, so that a result does not depend on how
a file or a base was laid out. `architectures.families` says which modules a fused weight consists
of.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..architectures.family import AuthorsWeight
from ..core.lowrank import LowRank
from ..errors import ShapeMismatch
from .vectors import split_rows, swap_halves


def split_update(whole: AuthorsWeight, update: LowRank, where: str) -> dict[str, LowRank]:
    """Splits an update exactly into the updates of the parts.

    Columns of `up` that are zero in all rows of a part say nothing about it and are left out: this
    undoes the block-diagonal `up` of kohya's trainer. A part with no column left has no update,
    unless all parts are empty. `update` is as the file lays it out.

    Raises:
        ShapeMismatch: the rows do not fit the parts.
    """
    heights = split_rows(whole, update.shape[0], where)
    if len(whole.parts) == 1:
        return {whole.parts[0]: _swap_update(whole, update)}
    updates = {}
    for part, up in zip(whole.parts, update.up.split(heights), strict=True):
        used = up.any(0).nonzero().flatten()
        if len(used):
            # Copies: parts must not share memory that a caller may write to.
            updates[part] = LowRank(up[:, used], update.down[used])
    if updates:
        return updates
    parts = zip(whole.parts, update.up.split(heights), strict=True)
    return {part: LowRank(up.clone(), update.down.clone()) for part, up in parts}


def fused_height(whole: AuthorsWeight, parts: Mapping[str, LowRank]) -> int:
    """Returns the rows of `whole`, computed from some of its parts.

    Raises:
        ShapeMismatch: the parts do not belong to one weight.
    """
    if len(whole.parts) == 1:
        return parts[whole.parts[0]].shape[0]
    shares = dict(zip(whole.parts, whole.shares, strict=True))
    units = {parts[name].shape[0] / shares[name] for name in parts}
    inputs = {parts[name].shape[1] for name in parts}
    if len(units) > 1 or len(inputs) > 1 or not units.copy().pop().is_integer():
        shapes = ", ".join(f"{name} {list(update.shape)}" for name, update in parts.items())
        raise ShapeMismatch(f"{whole.name} cannot be put together from {shapes}")
    return int(units.pop()) * sum(whole.shares)


def fused_rank(whole: AuthorsWeight, parts: Mapping[str, LowRank]) -> int:
    """Returns the rank of `fuse_updates`' result."""
    updates = list(parts.values())
    if len(whole.parts) == 1 or _share_down(updates):
        return updates[0].rank
    return sum(update.rank for update in updates)


def _share_down(updates: list[LowRank]) -> bool:
    first = updates[0].down
    return all(update.down is first or torch.equal(update.down, first) for update in updates)


def fuse_updates(whole: AuthorsWeight, parts: Mapping[str, LowRank]) -> LowRank:
    """Returns the update of the fused weight; a part without one gets zeros.

    Where all parts have one `down`, it is kept and the rank with it. Otherwise `up` is
    block-diagonal and the rank is the sum of the parts' ranks.

    Raises:
        ShapeMismatch: the parts do not belong to one weight.
    """
    if len(whole.parts) == 1:
        return _swap_update(whole, parts[whole.parts[0]])
    unit = fused_height(whole, parts) // sum(whole.shares)
    present = [name for name in whole.parts if name in parts]
    first = parts[present[0]]
    shared = _share_down(list(parts.values()))
    width = fused_rank(whole, parts)
    up = first.up.new_zeros(unit * sum(whole.shares), width)
    top = left = 0
    for name, share in zip(whole.parts, whole.shares, strict=True):
        height = unit * share
        if name in parts:
            rank = parts[name].rank
            up[top : top + height, left : left + rank] = parts[name].up
            left += 0 if shared else rank
        top += height
    down = first.down if shared else torch.cat([parts[name].down for name in present])
    return LowRank(up, down)


def _swap_update(whole: AuthorsWeight, update: LowRank) -> LowRank:
    """Swaps the halves of an update's rows if the authors' weight has them so."""
    return (
        LowRank(swap_halves(update.up), update.down) if whole.is_swapped(update.shape) else update
    )
