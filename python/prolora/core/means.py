"""Means of numbers that may be unknown."""

from __future__ import annotations

import math
from collections.abc import Iterable


def mean_defined(values: Iterable[float]) -> float:
    """Returns the mean of the values that are not NaN, or NaN."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def weighted_mean(pairs: Iterable[tuple[float, float | None]]) -> float | None:
    """Averages (weight, value) pairs without None values; None if no weight is left."""
    known = [(weight, value) for weight, value in pairs if value is not None]
    total = sum(weight for weight, _ in known)
    return float(sum(weight * value for weight, value in known) / total) if total else None
