"""The numbers of a group of modules: one source for the tables of a terminal and of a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..architectures.modules import find_stage
from ..core.means import weighted_mean
from .module_report import Measures, ModuleReport


@dataclass(frozen=True)
class GroupMeans:
    """Means over some mapped modules, weighted by the energy of their updates; None if unknown.

    Attributes:
        modules: how many they are.
        ranks: the least and the greatest rank in the output.
        phi_left, phi_right: overlap Φ of the bases' subspaces.
        above: the lesser side's overlap above chance.
        mixed: share of the energy in the update's mixed blocks.
        angle, largest_angle: the median and the largest principal angle, in radians.
        drift: ‖W_t − W_s‖/‖W_s‖.
        kept: ‖ΔW_t‖²/‖ΔW_s‖² of what was written.
        norm_ratio: ‖ΔW_t‖/‖ΔW_s‖.
        copy_distance: ‖ΔW_t − ΔW_s‖/‖ΔW_s‖.
    """

    modules: int
    ranks: tuple[int, int]
    phi_left: float | None
    phi_right: float | None
    above: float | None
    mixed: float | None
    angle: float | None
    largest_angle: float | None
    drift: float | None
    kept: float | None
    norm_ratio: float | None
    copy_distance: float | None

    @classmethod
    def of(cls, rows: Sequence[ModuleReport]) -> GroupMeans:
        """The means over rows that are mapped, at least one."""
        ranks = [row.rank_out for row in rows]
        left, right = (
            _measure(rows, lambda m: m.above_left),
            _measure(rows, lambda m: m.above_right),
        )
        sides = [side for side in (left, right) if side is not None]
        # A text encoder that is carried over was compared with nothing.
        is_compared = any(row.drift is not None or row.measures is not None for row in rows)
        compared = rows if is_compared else ()
        return cls(
            modules=len(rows),
            ranks=(min(ranks), max(ranks)),
            phi_left=_measure(rows, lambda m: m.phi_left),
            phi_right=_measure(rows, lambda m: m.phi_right),
            above=min(sides) if sides else None,
            mixed=_measure(rows, lambda m: m.range_null_energy + m.null_range_energy),
            angle=_measure(rows, lambda m: m.angle),
            largest_angle=_measure(rows, lambda m: m.largest_angle),
            drift=_mean(compared, lambda row: row.drift),
            kept=_mean(compared, lambda row: row.surviving_energy * (1 - row.rank_cut_energy)),
            norm_ratio=_mean(compared, lambda row: row.norm_ratio),
            copy_distance=_mean(compared, lambda row: row.copy_distance),
        )


def group_rows(
    rows: Iterable[ModuleReport], every_module: bool = False
) -> dict[str, list[ModuleReport]]:
    """The rows by the part of the model that they are in, or by module; in order of appearance."""
    groups: dict[str, list[ModuleReport]] = {}
    for row in rows:
        name = row.source if every_module else find_stage(row.source)
        groups.setdefault(name, []).append(row)
    return groups


def _mean(
    rows: Iterable[ModuleReport], value: Callable[[ModuleReport], float | None]
) -> float | None:
    """The mean by energy; updates without energy count alike."""
    values = [(row.energy, value(row)) for row in rows]
    mean = weighted_mean(values)
    return weighted_mean((1.0, number) for _, number in values) if mean is None else mean


def _measure(rows: Iterable[ModuleReport], value: Callable[[Measures], float]) -> float | None:
    return _mean(rows, lambda row: value(row.measures) if row.measures else None)
