"""One pair of weights of two base models: norms, products, and overlap of leading subspaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..architectures.modules import find_stage, matrix_shape
from ..bases import Base, check_finite
from ..core.basis import Basis
from ..core.means import mean_defined
from ..core.overlap_tables import basis_tables
from ..core.similarity import angle_quantiles, basis_similarity
from ..errors import NonFiniteWeights
from .drift import Affinity
from .rank_sweep import OverlapPoint, trace_curve

_NAN = math.nan

Factorise = Callable[[Base, str, Tensor], Basis]
"""Gives the basis of a module of a base; its weight [m, n] was read already."""


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
        """All of it, for JSON; of each point the columns of both and Φ left and right."""
        points = [
            (p.columns_source, p.columns_target, p.phi_left, p.phi_right) for p in self.points
        ]
        derived = {"drift": self.drift, "cosine": self.cosine, "above": self.above}
        return asdict(self) | derived | {"points": points}


def average_field(modules: Iterable[ModuleComparison], field: str) -> float:
    """The mean of a number over the modules where it is one; NaN if there is none."""
    return mean_defined(float(getattr(module, field)) for module in modules)


def compare_module(
    source: Base,
    origin: str,
    target: Base,
    module: str,
    factorise: Factorise | None,
) -> ModuleComparison:
    """Drift and cosine of a pair of weights, and the overlap of their bases where one is asked."""
    shape = matrix_shape(target.shapes[module])
    ours, theirs = (
        base.read(name).reshape(shape) for base, name in ((source, origin), (target, module))
    )
    try:
        affinity = Affinity.of(ours, theirs)
    except NonFiniteWeights:
        check_finite(source, [origin])  # says which tensor, and where in it
        check_finite(target, [module])
        raise
    if factorise is None:
        return ModuleComparison(origin, module, shape, affinity)
    old, new = factorise(source, origin, ours), factorise(target, module, theirs)
    tables = basis_tables(old, new)
    similar = basis_similarity(old, new, tables)
    angles = angle_quantiles(old, new)
    return ModuleComparison(
        origin,
        module,
        shape,
        affinity,
        phi_left=similar.left.item(),
        phi_right=similar.right.item(),
        chance_left=similar.chance_left.item(),
        chance_right=similar.chance_right.item(),
        above_left=similar.above_left.item(),
        above_right=similar.above_right.item(),
        columns_source=int(old.rank),
        columns_target=int(new.rank),
        angles_left=tuple(angles[0][0].tolist()),
        angles_right=tuple(angles[1][0].tolist()),
        points=trace_curve(old, new, tables),
    )
