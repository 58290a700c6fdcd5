"""Estimates of the memory that singular subspaces take, in bytes.

Upper estimates: measured peaks are below them (docs/performance.md).
"""

from __future__ import annotations

from .rank_rule import Rank

# What a factorisation of a weight [m, n] with k columns takes beyond the weight, d = min(m, n):
# bytes for each of mn entries, of d² (Gram matrix), of (m + n)k (basis) and of k².
PER_ENTRY, PER_GRAM, PER_BASIS, PER_CORE = 12, 45, 18, 48
# What projecting the factors of an update of rank r takes beyond them: bytes for each of (m + n)r.
PER_COLUMN = 56


def columns_at_most(shape: tuple[int, int], rank: Rank | None) -> int:
    """Returns the largest possible number of columns: all of them for a share of the energy."""
    d = min(shape)
    return min(rank, d) if isinstance(rank, int) else d


def bytes_of_factorisation(shape: tuple[int, int], rank: Rank | None) -> int:
    """Estimates the bytes of a factorisation of a weight [m, n], the weight left out."""
    (m, n), d, k = shape, min(shape), columns_at_most(shape, rank)
    return PER_ENTRY * m * n + PER_GRAM * d * d + PER_BASIS * (m + n) * k + PER_CORE * k * k
