"""Overlap against the number of columns: what another rank or another threshold would find."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.basis import Basis
from ..core.means import mean_defined
from ..core.overlap_tables import OverlapTable
from ..core.verdict import DEFAULT_THRESHOLD

FEWEST_COLUMNS = 16
"""Columns of the first point; each further point has twice as many."""

THRESHOLDS = (0.7, DEFAULT_THRESHOLD, 0.9)
"""The Φ for which passing pairs are counted."""


@dataclass(frozen=True)
class OverlapPoint:
    """One pair of bases [m, n], cut to their leading columns.

    Attributes:
        columns_source, columns_target: how many; unequal only where both are whole.
        energy: share of ‖W‖_F² that they hold, the mean of source and target.
        phi_left, phi_right: overlap Φ.
        chance_left, chance_right: what unrelated weights would score.
    """

    columns_source: int
    columns_target: int
    energy: float
    phi_left: float
    phi_right: float
    chance_left: float
    chance_right: float

    @property
    def above(self) -> float:
        """The lesser of the two sides' (Φ − chance)/(1 − chance); NaN where neither has one."""
        sides = ((self.phi_left, self.chance_left), (self.phi_right, self.chance_right))
        return min(((p - c) / (1 - c) for p, c in sides if c < 1), default=math.nan)

    def passes(self, threshold: float) -> bool:
        """Returns whether both sides reach the threshold, as `transfer` demands."""
        return min(self.phi_left, self.phi_right) >= threshold


@dataclass(frozen=True)
class SweepRow:
    """All pairs at one number of columns.

    Attributes:
        columns: of both bases; a pair with a basis that holds no more counts with its whole bases.
        whole: how many pairs do.
        energy, phi_left, phi_right, chance_left, chance_right, above: means of `OverlapPoint`'s
            over the
            pairs, where they are defined.
        passing: threshold -> how many pairs reach it on both sides.
    """

    columns: int
    whole: int
    energy: float
    phi_left: float
    phi_right: float
    chance_left: float
    chance_right: float
    above: float
    passing: dict[str, int]

    @classmethod
    def of(cls, columns: int, pairs: Sequence[Sequence[OverlapPoint]]) -> SweepRow:
        """Makes the row of pairs, each with its `trace_curve`."""
        points = [_find_point(curve, columns) for curve in pairs]
        return cls(
            columns=columns,
            whole=sum(p is curve[-1] for p, curve in zip(points, pairs, strict=True)),
            energy=mean_defined([p.energy for p in points]),
            phi_left=mean_defined([p.phi_left for p in points]),
            phi_right=mean_defined([p.phi_right for p in points]),
            chance_left=mean_defined([p.chance_left for p in points]),
            chance_right=mean_defined([p.chance_right for p in points]),
            above=mean_defined([p.above for p in points]),
            passing={f"{t:g}": sum(p.passes(t) for p in points) for t in THRESHOLDS},
        )


def trace_curve(
    shape: tuple[int, ...],
    energies: tuple[Sequence[float], Sequence[float]],
    tables: tuple[OverlapTable, OverlapTable],
) -> tuple[OverlapPoint, ...]:
    """Returns the points of a pair: at 16, 32, 64 … columns, and whole.

    Args:
        shape: of both weights.
        energies: of source and target, the share that the leading 1, 2, 3 … columns hold, as many
            as the basis has (`energy_shares`).
        tables: of the two, left and right (`core.overlap_tables.basis_tables`), of one pair.
    """
    m, n = shape
    held = len(energies[0]), len(energies[1])

    def point(ks: int, kt: int) -> OverlapPoint:
        left, right = (table.at(ks, kt).item() for table in tables)
        energy = (energies[0][ks - 1] + energies[1][kt - 1]) / 2
        return OverlapPoint(ks, kt, energy, left, right, max(ks, kt) / m, max(ks, kt) / n)

    return (*(point(k, k) for k in _column_steps(min(held))), point(*held))


def sweep_columns(pairs: Sequence[Sequence[OverlapPoint]]) -> list[SweepRow]:
    """Makes the rows of pairs up to the largest basis's columns."""
    if not pairs:
        return []
    most = max(max(points[-1].columns_source, points[-1].columns_target) for points in pairs)
    return [SweepRow.of(columns, pairs) for columns in (*_column_steps(most), most)]


def _column_steps(most: int) -> list[int]:
    """Returns 16, 32, 64 … below `most`."""
    counts = []
    columns = FEWEST_COLUMNS
    while columns < most:
        counts.append(columns)
        columns *= 2
    return counts


def _find_point(points: Sequence[OverlapPoint], columns: int) -> OverlapPoint:
    """Returns the point with so many columns, else the last, which is whole."""
    return next((p for p in points[:-1] if p.columns_source == columns), points[-1])


def energy_shares(basis: Basis) -> list[list[float]]:
    """Returns the energy share of each matrix's leading 1, 2, 3 … columns."""
    squares = basis.S.double().square().cumsum(-1)
    shares = squares / squares[:, -1:].clamp_min(1e-300) * basis.energy[:, None]
    used = basis.rank.clamp_min(1).tolist()
    return [row[:k] for row, k in zip(shares.tolist(), used, strict=True)]
