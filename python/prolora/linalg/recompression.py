"""Products of thin factors brought to the fewest columns, without forming the product."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .precision import working_dtype

# The in-house Jacobi takes cores up to this width; wider ones go to LAPACK or cuSOLVER.
MAX_JACOBI_COLUMNS = 128


def core_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of small matrices core [..., p, q] -> U [..., p, d], S [..., d], V [..., q, d]."""
    p, q = core.shape[-2:]
    if q > p:
        v, s, u = core_svd(core.mT)
        return u, s, v
    if q <= MAX_JACOBI_COLUMNS:
        return ops.small_svd(core)
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    return u, s, vt.mT


def product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of up @ down: QR of both factors, then the SVD of the small core R_up·R_downᵀ.

    Args:
        up: [..., m, r].
        down: [..., r, n].

    Returns:
        U [..., m, d], S [..., d] in descending order and V [..., n, d], d ≤ r. Where a singular
        value is zero the columns of U or V carry no meaning.
    """
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, s, v = core_svd(r_up @ r_down.mT)
    return q_up @ u, s, q_down @ v


def merge_orthogonal(
    parts: list[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a sum of parts whose columns, and whose rows, are orthogonal to each other.

    The two halves of ProLoRA are such parts (METHOD §1: range and complement of the same target
    basis), so the SVD of the sum is the union of theirs: no factorisation of twice the width.

    Args:
        parts: the SVDs (U [..., m, d_i], S [..., d_i], V [..., n, d_i]).
    """
    u = torch.cat([part[0] for part in parts], -1)
    s = torch.cat([part[1] for part in parts], -1)
    v = torch.cat([part[2] for part in parts], -1)
    s, order = torch.sort(s, dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2)
    return u.take_along_dim(columns, -1), s, v.take_along_dim(columns, -1)


def balanced(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Factors U√S [..., m, d] and √S·Vᵀ [..., d, n]: equal norms are kindest to half precision."""
    root = s.clamp_min(0).sqrt()
    return u * root.unsqueeze(-2), (v * root.unsqueeze(-2)).mT


def columns_holding(s: Tensor, energy: float) -> Tensor:
    """The fewest leading values of s [..., d] that hold the share `energy` of Σs²: int64 [...]."""
    cumulative = s.double().square().cumsum(-1)
    wanted = energy * cumulative[..., -1:]
    # The slack keeps energy=1 from asking for one column more than rounding can deliver.
    short = cumulative < wanted * (1 - 1e-12)
    return (short.sum(-1) + 1).clamp_max(s.shape[-1])


def recompress(
    up: Tensor, down: Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor]:
    """Best factors of up @ down at a lower rank (Eckart–Young), in the factors' dtype.

    Args:
        up: [..., m, r].
        down: [..., r, n].
        rank: at most this many columns.
        energy: the fewest columns that hold this share of Σσ² for every matrix of the stack.

    Returns:
        Balanced factors [..., m, d] and [..., d, n].

    Raises:
        ValueError: rank < 1, or energy outside (0, 1].
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], not {energy}")
    work = working_dtype(up.dtype)
    u, s, v = product_svd(up.to(work), down.to(work))
    keep = s.shape[-1]
    if energy is not None and s.numel():
        keep = int(columns_holding(s, energy).max())
    if rank is not None:
        keep = min(keep, rank)
    new_up, new_down = balanced(u[..., :keep], s[..., :keep], v[..., :keep])
    return new_up.to(up.dtype), new_down.to(down.dtype)
