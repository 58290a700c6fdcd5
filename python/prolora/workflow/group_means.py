"""Means over a group of modules that moved: for the tables of a terminal and of a page.

They are weighted by the energy of the updates, and None where a number is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..architectures.modules import find_stage
from ..core.grouping import group_by
from ..core.means import weighted_mean
from .module_report import Measures, ModuleReport


def group_rows(
    rows: Iterable[ModuleReport], every_module: bool = False
) -> dict[str, list[ModuleReport]]:
    """Groups the rows by part of the model or module, in order of appearance."""
    return group_by(rows, lambda row: row.source if every_module else find_stage(row.source))


def average_rows(
    rows: Sequence[ModuleReport], value: Callable[[ModuleReport], float | None]
) -> float | None:
    """Averages over modules; None for a text encoder carried over uncompared."""
    is_compared = any(row.drift is not None or row.measures is not None for row in rows)
    return _average(rows, value) if is_compared else None


def average_measures(
    rows: Sequence[ModuleReport], value: Callable[[Measures], float]
) -> float | None:
    """Averages over modules that were projected."""
    return _average(rows, lambda row: value(row.measures) if row.measures else None)


def find_overlap(rows: Sequence[ModuleReport]) -> float | None:
    """Returns the overlap above chance of the worse side."""
    left = average_measures(rows, lambda m: m.above_left)
    right = average_measures(rows, lambda m: m.above_right)
    return min((side for side in (left, right) if side is not None), default=None)


def _average(
    rows: Iterable[ModuleReport], value: Callable[[ModuleReport], float | None]
) -> float | None:
    """Averages by energy; updates without energy count alike."""
    values = [(row.energy, value(row)) for row in rows]
    mean = weighted_mean(values)
    return weighted_mean((1.0, number) for _, number in values) if mean is None else mean
