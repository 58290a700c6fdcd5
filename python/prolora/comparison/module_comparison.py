"""Pairs of weights of two base models: norms, products, and overlap of leading subspaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..architectures.modules import find_stage, matrix_shape
from ..bases import Base, check_finite
from ..core.affinity import Affinity
from ..core.basis import Basis
from ..core.means import mean_defined
from ..core.overlap_tables import basis_tables
from ..core.parallel import map_on_threads
from ..core.similarity import angle_quantiles, basis_similarity
from ..errors import NonFiniteWeights
from .rank_sweep import OverlapPoint, energy_shares, trace_curve

_NAN = math.nan

Weights = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Of pairs, the weights [m, n] of the sources and of the targets."""

Factorise = Callable[[Sequence[tuple[str, str]], Weights], tuple[Basis, Basis]]
"""Gives the bases of the weights of pairs of modules, as those of two stacks [b, m, n]."""

# Field of `ModuleComparison` -> of `Similarity`.
_OVERLAPS = {
    "phi_left": "left",
    "phi_right": "right",
    "chance_left": "chance_left",
    "chance_right": "chance_right",
    "above_left": "above_left",
    "above_right": "above_right",
}


@dataclass(frozen=True)
class ModuleComparison:
    """One pair of weights.

    Attributes:
        source, target: module names.
        shape: out × in.
        affinity: norms and products behind drift and cosine.
        phi_left, phi_right, chance_left, chance_right, above_left, above_right: overlap of the
            leading subspaces, see `core.similarity.Similarity`; NaN where it was not asked for.
        columns_source, columns_target: k of the bases; 0 where there are none.
        angles_left, angles_right: principal angles between the subspaces in radians, at the shares
            `core.similarity.ANGLE_SHARES` of their number, smallest first; empty where there are
            none.
        points: the overlap at fewer columns, see `sweep_columns`; empty where there are none.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    affinity: Affinity
    phi_left: float = _NAN
    phi_right: float = _NAN
    chance_left: float = _NAN
    chance_right: float = _NAN
    above_left: float = _NAN
    above_right: float = _NAN
    columns_source: int = 0
    columns_target: int = 0
    angles_left: tuple[float, ...] = ()
    angles_right: tuple[float, ...] = ()
    points: tuple[OverlapPoint, ...] = ()

    @property
    def place(self) -> str:
        """The part of the model: `down_blocks.1`, `mid_block`, … or the first name element."""
        return find_stage(self.target)

    @property
    def above(self) -> float:
        """The lesser of the two sides' overlaps above chance; NaN if neither has one."""
        sides = [side for side in (self.above_left, self.above_right) if not math.isnan(side)]
        return min(sides, default=_NAN)

    @property
    def drift(self) -> float:
        """‖W_t − W_s‖_F / ‖W_s‖_F; about √2 for unrelated weights of equal norm."""
        return self.affinity.drift

    @property
    def cosine(self) -> float:
        """⟨W_s, W_t⟩ / (‖W_s‖‖W_t‖); about 0 for unrelated weights."""
        return self.affinity.cosine

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields for JSON; each point as columns and Φ of both."""
        points = [
            (p.columns_source, p.columns_target, p.phi_left, p.phi_right) for p in self.points
        ]
        derived = {"drift": self.drift, "cosine": self.cosine, "above": self.above}
        return asdict(self) | derived | {"points": points}


def average_field(modules: Iterable[ModuleComparison], field: str) -> float:
    """Averages a field over the modules where it is a number, or NaN."""
    return mean_defined(float(getattr(module, field)) for module in modules)


def compare_stack(
    source: Base,
    target: Base,
    pairs: Sequence[tuple[str, str]],
    factorise: Factorise | None,
) -> list[ModuleComparison]:
    """Measures drift, cosine and, with `factorise`, overlap of pairs of weights.

    All weights have one matrix shape; `pairs` are (source module, target module).
    """
    shape = matrix_shape(target.shapes[pairs[0][1]])
    first = [source.read(origin).reshape(shape) for origin, _ in pairs]
    second = [target.read(module).reshape(shape) for _, module in pairs]
    try:
        affinities = map_on_threads(
            lambda weights: Affinity.of(*weights), list(zip(first, second, strict=True))
        )
    except NonFiniteWeights:
        for origin, module in pairs:
            check_finite(source, [origin])  # says which tensor, and where in it
            check_finite(target, [module])
        raise
    rows = [
        ModuleComparison(*names, shape, affinity)
        for names, affinity in zip(pairs, affinities, strict=True)
    ]
    if factorise is None:
        return rows
    numbers = _measure_overlaps(*factorise(pairs, (first, second)))
    return [replace(row, **overlap) for row, overlap in zip(rows, numbers, strict=True)]


def _measure_overlaps(old: Basis, new: Basis) -> Iterator[dict[str, Any]]:
    """Yields the subspace fields of `ModuleComparison` for each pair of two stacks."""
    on_device = basis_tables(old, new)
    similar = basis_similarity(old, new, on_device)
    overlaps = torch.stack([getattr(similar, name).double() for name in _OVERLAPS.values()], 1)
    left, right = (x.tolist() for x in angle_quantiles(old, new))
    tables = [table.cpu() for table in on_device]
    shares = list(zip(energy_shares(old), energy_shares(new), strict=True))
    columns = list(zip(old.rank.tolist(), new.rank.tolist(), strict=True))
    for i, numbers in enumerate(overlaps.tolist()):
        held = len(shares[i][0]), len(shares[i][1])
        of_left, of_right = (table.pair(i, *held) for table in tables)
        yield dict(zip(_OVERLAPS, numbers, strict=True)) | {
            "columns_source": columns[i][0],
            "columns_target": columns[i][1],
            "angles_left": tuple(left[i]),
            "angles_right": tuple(right[i]),
            "points": trace_curve(old.shape[-2:], shares[i], (of_left, of_right)),
        }
