"""How many columns a rule asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from .recompression import columns_holding

Rank = int | float
"""An int is that many columns; a float in (0, 1) the smallest number holding that share of Σσ²."""

# By what share of itself `snap` may move a number of columns.
SNAP = 0.05


def check_rank(rank: Rank) -> None:
    """Raises ValueError unless rank is an int ≥ 1 or a float in (0, 1)."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank < 1
    if not (whole or share):
        raise ValueError(f"rank must be an int ≥ 1 or a share of energy in (0, 1), not {rank!r}")


def snap_reach(k: int) -> int:
    """By how many columns `snap` may move k."""
    return int(SNAP * k)


def count_columns(s: Tensor, rank: Rank, snap: bool) -> Tensor:
    """The number of leading values of s [..., d], descending, that the rule asks for: int64 [...].

    Args:
        s: singular values.
        rank: the rule.
        snap: move the cut by up to 5 % to where the gap behind it is widest.
    """
    d = s.shape[-1]
    if isinstance(rank, float):
        wanted = columns_holding(s, rank)
    else:
        wanted = torch.full(s.shape[:-1], min(rank, d), dtype=torch.int64, device=s.device)
    if not snap:
        return wanted
    flat = zip(s.reshape(-1, d), wanted.flatten().tolist(), strict=True)
    moved = [snap_cut(values, k) for values, k in flat]
    return torch.tensor(moved, dtype=torch.int64, device=s.device).reshape(wanted.shape)


def snap_cut(s: Tensor, k: int) -> int:
    """The cut near k with the widest gap behind it, relative to the last value kept.

    A subspace that ends between nearly equal values changes with every rounding of the weight; a
    few columns further it may not. Of equal gaps the one nearest to k wins.
    """
    low, high = max(1, k - snap_reach(k)), min(len(s) - 1, k + snap_reach(k))
    if low >= high:
        return k
    last, following = s[low - 1 : high], s[low : high + 1]
    gaps = torch.where(last > 0, (last - following) / last.clamp_min(1e-300), 0.0)
    widest: list[int] = (gaps == gaps.max()).nonzero().flatten().tolist()
    return min((low + i for i in widest), key=lambda cut: (abs(cut - k), cut))
