"""Means with bootstrap 95 % intervals over seeds and adapters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

RESAMPLES = 4000


def interval(values: Mapping[tuple, float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of values by (seed, adapter).

    Targets and adapters are both draws from something larger, and the adapters of one target share
    its luck. So seeds and adapters are resampled independently, each with replacement, and the
    mean is taken over their product (the two-way bootstrap of a crossed design).

    Args:
        values: {(seed, adapter): value}; a seed may be any hashable, such as (arch, seed).

    Returns:
        (mean, lower, upper).
    """
    seeds = sorted({seed for seed, _ in values}, key=str)
    adapters = sorted({adapter for _, adapter in values})
    table = np.array([[values.get((s, a), np.nan) for a in adapters] for s in seeds])
    generator = np.random.default_rng(0)
    rows = generator.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    columns = generator.integers(len(adapters), size=(RESAMPLES, len(adapters)))
    means = np.nanmean(table[rows[:, :, None], columns[:, None, :]], axis=(1, 2))
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(np.nanmean(table)), float(low), float(high)
