"""Means of numbers that may be unknown."""

from __future__ import annotations

from collections.abc import Iterable


def weighted_mean(pairs: Iterable[tuple[float, float | None]]) -> float | None:
    """Averages (weight, value) pairs without None values; None if no weight is left."""
    finite = [(weight, value) for weight, value in pairs if value is not None]
    total = sum(weight for weight, _ in finite)
    return float(sum(weight * value for weight, value in finite) / total) if total else None
