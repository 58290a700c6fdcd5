"""Which rows of a matrix are the rows of another one, after a little training or rounding.

A row is matched where it is by far nearer to one row than to any other. Rows that are alike, zero
rows and rows of unrelated matrices stay unknown: no row is guessed.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNKNOWN = -1
"""Stands for the index of a row that could not be matched."""

ROW_TOLERANCE = 0.7
"""The largest distance of a row to its match, in units of its norm; unrelated rows are √2 apart."""

MARGIN, CHANCE = 0.5, 1e-5
"""A match is less than this share as far away as the next nearest row.

The share is smaller in few dimensions c, so that the nearest of unrelated rows passes with a chance
of share^c = 1e-5 at most."""

# Unrelated rows of unit norm are √2 apart; 64 random projections keep that to within a factor of 2
# among ten thousand rows. They only choose candidates: their distances are then computed exactly.
_PROJECTIONS = 64
_CANDIDATES = 4
_BLOCK_ENTRIES = 1 << 22


def match_rows(ours: Tensor, theirs: Tensor) -> Tensor:
    """The row of `ours` that each row of `theirs` is, each row of `ours` at most once.

    Takes memory for a few blocks of rows beside the operands.

    Args:
        ours: [m, c].
        theirs: [l, c], of the same float dtype on the same device.

    Returns:
        Indices [l] into the rows of `ours`, on the CPU; `UNKNOWN` where there is no match.
    """
    (m, c), count = ours.shape, len(theirs)
    if c == 0 or m == 0:
        return torch.full((count,), UNKNOWN)
    small_ours, small_theirs = ours, theirs
    if c > 2 * _PROJECTIONS:
        generator = torch.Generator().manual_seed(c)
        mixing = torch.randn(c, _PROJECTIONS, generator=generator).to(ours)
        small_ours, small_theirs = ours @ mixing, theirs @ mixing
    norms = small_ours.square().sum(1)
    size = max(1, _BLOCK_ENTRIES // max(m, _CANDIDATES * c))
    parts = []
    for start in range(0, count, size):
        block = theirs[start : start + size]
        # ‖t − s‖² without ‖t‖², which is the same for all s.
        near = torch.addmm(norms[None], small_theirs[start : start + size], small_ours.mT, alpha=-2)
        candidates = near.topk(min(_CANDIDATES, m), largest=False).indices
        parts.append(_choose_nearest(block, ours, candidates))
    return _drop_repeated(torch.cat(parts).cpu(), m) if parts else torch.empty(0).long()


def _choose_nearest(block: Tensor, ours: Tensor, candidates: Tensor) -> Tensor:
    """Of some rows [b, c] the match among their candidates [b, k], which are rows of `ours`."""
    distances = (block[:, None] - ours[candidates]).norm(dim=2)
    ordered, order = distances.sort(dim=1)
    nearest = ordered[:, 0]
    good = nearest <= ROW_TOLERANCE * block.norm(dim=1)
    if ordered.shape[1] > 1:
        good &= nearest < min(MARGIN, CHANCE ** (1 / ours.shape[1])) * ordered[:, 1]
    indices = candidates.gather(1, order[:, :1]).squeeze(1)
    return torch.where(good, indices, UNKNOWN)


def _drop_repeated(match: Tensor, m: int) -> Tensor:
    """A row that several rows would be is the match of none of them."""
    known = match[match >= 0]
    repeated = torch.bincount(known, minlength=m) > 1
    return torch.where((match >= 0) & repeated[match.clamp_min(0)], UNKNOWN, match)


def complete_by_order(match: Tensor, m: int) -> Tensor:
    """Fills the unknown rows that leave no choice, where a selection keeps the order of the rows.

    Between two matches that are as many rows apart as the rows between them on the other side,
    each of these is known. That settles rows which are alike, as zero rows are.

    Args:
        match: [l] indices below m, or `UNKNOWN`.
        m: number of rows that are selected from.
    """
    at = torch.cat([torch.tensor([-1]), (match >= 0).nonzero().squeeze(1)])
    at = torch.cat([at, torch.tensor([len(match)])])
    row = torch.cat([torch.tensor([-1]), match[match >= 0], torch.tensor([m])])
    if 2 * (len(at) - 2) < len(match) or not bool((row.diff() > 0).all()):
        return match
    filled = match.clone()
    for start, stop, first, last in zip(
        at[:-1].tolist(), at[1:].tolist(), row[:-1].tolist(), row[1:].tolist(), strict=True
    ):
        if stop - start > 1 and stop - start == last - first:
            filled[start + 1 : stop] = torch.arange(first + 1, last)
    return filled
