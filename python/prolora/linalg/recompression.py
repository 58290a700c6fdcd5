"""Products of thin factors brought to the fewest columns, without forming the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops, row_ops
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


def energies(up: Tensor, down: Tensor) -> Tensor:
    """σ² [..., r] of up @ down in float64, descending; no vectors, and so a third of the time.

    They are the eigenvalues of Hᵀ(down·downᵀ)H with HHᵀ = upᵀup, which are r×r. Errors are those of
    float64 in ‖up‖²‖down‖²: what squaring loses of a small σ is nothing of the energy.

    Args:
        up: [..., m, r].
        down: [..., r, n].
    """
    up, down = up.detach().double(), down.detach().double()
    values, vectors = torch.linalg.eigh(up.mT @ up)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    found: Tensor = torch.linalg.eigvalsh(root.mT @ (down @ down.mT) @ root)
    return found.clamp_min(0).flip(-1)


@dataclass(frozen=True)
class Factored:
    """The thin SVD of a product, not yet multiplied out: (Q_lᵀ u) diag(s) (Q_rᵀ v)ᵀ.

    Attributes:
        left: Q_l [..., d, m], orthonormal rows.
        u: [..., d, c].
        s: [..., c], descending.
        v: [..., d', c].
        right: Q_r [..., d', n].
    """

    left: Tensor
    u: Tensor
    s: Tensor
    v: Tensor
    right: Tensor


def orthonormal_rows(panel: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q [..., d, m] and L [..., r, d] of panel = L Q [..., r, m], d ≤ min(r, m).

    float32 by Cholesky QR, whatever it cannot do by Householder reflections. Rows that the others
    span leave zeros in Q.
    """
    r, m = panel.shape[-2:]
    if panel.dtype == torch.float32 and r <= min(m, row_ops.MAX_PANEL_ROWS):
        q, lower, rank = row_ops.panel_qr(panel)
        failed = rank < 0
        if failed.any():
            # NaN and Inf among them stay what they are.
            again, upper = torch.linalg.qr(panel[failed].mT)
            q[failed], lower[failed] = again.mT, upper.mT
        return q, lower
    q, upper = torch.linalg.qr(panel.mT)
    return q.mT, upper.mT


def factored(up: Tensor, down: Tensor) -> Factored:
    """SVD of up @ down: orthonormal rows of both factors, then the SVD of the small core.

    Values alone: where singular values meet, their vectors have no gradient.

    Args:
        up: [..., m, r].
        down: [..., r, n].
    """
    q_up, l_up = orthonormal_rows(up.detach().mT)
    q_down, l_down = orthonormal_rows(down.detach())
    u, s, v = core_svd(l_up.mT @ l_down)
    return Factored(q_up, u, s, v, q_down)


def product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of up @ down.

    Args:
        up: [..., m, r].
        down: [..., r, n].

    Returns:
        U [..., m, d], S [..., d] in descending order and V [..., n, d], d ≤ r. Where a singular
        value is zero the columns of U or V carry no meaning.
    """
    found = factored(up, down)
    return found.left.mT @ found.u, found.s, found.right.mT @ found.v


def merged(parts: list[Factored]) -> tuple[Tensor, Tensor, Tensor]:
    """Balanced factors of a sum of parts whose columns, and whose rows, are orthogonal.

    The two halves of ProLoRA are such parts (METHOD §1: range and complement of the same target
    basis), so the SVD of the sum is the union of theirs: no factorisation of twice the width. They
    are sorted while they are small.

    Args:
        parts: SVDs, of shapes that agree but for the numbers of rows and columns.

    Returns:
        U√S [..., m, c], S [..., c] in descending order and √S·Vᵀ [..., c, n].
    """
    s, order = torch.sort(
        torch.cat([part.s for part in parts], -1), dim=-1, descending=True, stable=True
    )
    root = s.clamp_min(0).sqrt().unsqueeze(-2)
    columns = order.unsqueeze(-2)

    def sorted_cores(cores: list[Tensor]) -> Tensor:
        """Blocks on a diagonal [..., Σd, Σc], columns in order and scaled."""
        wide = cores[0].new_zeros(*s.shape[:-1], sum(core.shape[-2] for core in cores), s.shape[-1])
        row = column = 0
        for core in cores:
            d, c = core.shape[-2:]
            wide[..., row : row + d, column : column + c] = core
            row, column = row + d, column + c
        return wide.take_along_dim(columns, -1) * root

    left, right = (sorted_cores(cores) for cores in
                   ([part.u for part in parts], [part.v for part in parts]))  # fmt: skip
    up = torch.cat([part.left for part in parts], -2).mT @ left
    return up, s, right.mT @ torch.cat([part.right for part in parts], -2)


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
