"""How many columns a rule asks for."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .arrays import to_plain_number

Rank = int | float
"""An int is that many columns; a float in (0, 1) the smallest number holding that share of Σσ²."""


def read_rank(rank: Any) -> Rank:
    """Returns the rank as a number of Python; takes numpy's numbers too.

    Raises:
        ValueError: it is neither an int ≥ 1 nor a float in (0, 1).
    """
    given, rank = rank, to_plain_number(rank)
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank < 1
    if not (whole or share):
        raise ValueError(f"rank must be an int ≥ 1 or a share of energy in (0, 1), not {given!r}")
    return cast(Rank, rank)


def columns_holding(s: Tensor, energy: float) -> Tensor:
    """Counts the leading values of s [..., d] that hold a share of Σs²: int64 [...]."""
    cumulative = s.double().square().cumsum(-1)
    wanted = energy * cumulative[..., -1:]
    # The slack keeps energy=1 from asking for one column more than rounding can deliver.
    short = cumulative < wanted * (1 - 1e-12)
    return (short.sum(-1) + 1).clamp_max(s.shape[-1])


def count_columns(s: Tensor, rank: Rank) -> Tensor:
    """Counts the leading values of s [..., d] that the rule asks for: int64 [...].

    `s` descends. `rank` is at most d columns, or the share of energy that they hold.
    """
    if isinstance(rank, float):
        return columns_holding(s, rank)
    return torch.full(s.shape[:-1], min(rank, s.shape[-1]), dtype=torch.int64, device=s.device)
