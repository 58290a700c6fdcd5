"""Fitted updates at low rank, by reduced-rank regression on what the probes see of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.lowrank import LowRank
from ...core.rank_rule import count_columns


def count_directions(values: Tensor, rank: float) -> int:
    """How many singular values a rank keeps.

    Args:
        values: singular values [d], descending.
        rank: that many (1 or more), or the share of Σσ² that the fewest must hold (below 1).
    """
    return int(count_columns(values, int(rank) if rank >= 1 else rank))


def cut_to_rank(
    update: Tensor, left: Tensor | None, right: Tensor, rank: float, damping: float
) -> LowRank:
    """The low-rank update that is closest to D in the metric ‖L^½·(D − D')·R^½‖_F.

    The r leading singular triplets of L^½·D·R^½, taken back by L^(−½) and R^(−½), where L and R
    are first damped by `damping` times their mean diagonal.

    Args:
        update: D [m, n].
        left: L = Σ g gᵀ [m, m] over what the module's outputs act on, or its diagonal [m]; None:
            the identity.
        right: R = Σ x xᵀ [n, n] over what the module reads, or its diagonal [n].
        rank: of the result; see `count_directions`.
        damping: relative to the mean diagonal of L and of R.
    """
    left_root, left_back = (None, None) if left is None else _compute_roots(left, damping)
    right_root, right_back = _compute_roots(right, damping)
    weighted = multiply_factors(left_root, update, right_root)
    u, s, v = torch.linalg.svd(weighted, full_matrices=False)
    count = count_directions(s, rank)
    size = s[:count].sqrt()
    up = multiply_factors(left_back, u[:, :count] * size, None)
    down = multiply_factors(None, size[:, None] * v[:count], right_back)
    return LowRank(up.float().contiguous(), down.float().contiguous())


def multiply_factors(left: Tensor | None, matrix: Tensor, right: Tensor | None) -> Tensor:
    """left·matrix·right, each side a matrix, the diagonal of one, or None for the identity."""
    if left is not None:
        matrix = left @ matrix if left.dim() == 2 else left[:, None] * matrix
    if right is not None:
        matrix = matrix @ right if right.dim() == 2 else matrix * right
    return matrix


def _compute_roots(factor: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(F + damping·mean(diag F)·I)^½ and its inverse, of a matrix [n, n] or a diagonal [n]."""
    if factor.dim() == 1:
        root = (factor + damping * factor.mean().clamp_min(1e-30)).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp_min(0)
    root = (values + damping * values.mean().clamp_min(1e-30)).sqrt()
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
