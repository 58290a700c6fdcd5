"""Fused weights' updates and vectors <-> their parts'.

The parts are rows of the fused weight. prolora moves parts, so that a result does not depend on how
a file or a base was laid out. `architectures.families` says which modules a fused weight consists
of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..architectures.family import AuthorsWeight
from ..core.lowrank import LowRank
from ..errors import NonFiniteWeights, ShapeMismatch
from .lora import Lora, read_finite
from .vectors import VectorSlot, split_rows


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
    return (
        LowRank(swap_halves(update.up), update.down) if whole.is_swapped(update.shape) else update
    )


def swap_halves(tensor: Tensor) -> Tensor:
    """Puts the lower half of the rows above the upper half."""
    return tensor.roll(len(tensor) // 2, 0)


def read_vector(slot: VectorSlot, scale: float, source: Lora) -> dict[str, Tensor]:
    """Reads the vectors of a slot by name, float32: several for a fused weight.

    Raises:
        NonFiniteWeights: NaN or Inf, or an overflow in the scale.
    """
    vector = read_finite(source, slot.key)
    if slot.scaled and scale != 1:
        vector *= scale
        if not vector.isfinite().all():
            raise NonFiniteWeights(f"{source.where}: {slot.key} times {scale:.6g} overflows")
    if slot.module.matrix is None:
        return {slot.name: vector}
    parts = split_update(slot.module.matrix, _as_update(vector), source.where)
    return {f"{name}.{slot.tensor}": part.up[:, 0] for name, part in parts.items()}


def fuse_vectors(
    vectors: Mapping[str, Tensor], find_weight: Callable[[str], AuthorsWeight | None]
) -> dict[str, Tensor]:
    """Fuses biases for a file whose matrices contain several modules.

    A part without a bias of its own gets zeros. `find_weight` is as in `Codec`.

    Raises:
        ShapeMismatch: the parts do not belong to one weight.
    """
    out: dict[str, Tensor] = {}
    fused: dict[str, tuple[AuthorsWeight, dict[str, LowRank]]] = {}
    for name, vector in vectors.items():
        module, _, tensor = name.rpartition(".")
        matrix = find_weight(module)
        if matrix is None or (len(matrix.parts) == 1 and matrix.swap == "never"):
            out[name] = vector
        else:
            _, parts = fused.setdefault(f"{matrix.name}.{tensor}", (matrix, {}))
            parts[module] = _as_update(vector)
    return out | {name: fuse_updates(*both).up[:, 0] for name, both in fused.items()}


def _as_update(vector: Tensor) -> LowRank:
    """Returns a vector as the update of a weight with one column."""
    return LowRank(vector[:, None], vector.new_ones(1, 1))
