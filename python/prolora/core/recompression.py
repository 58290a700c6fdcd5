"""Products of thin factors, recompressed without forming the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .exceptions import NonFiniteWeights, SolverFailure
from .ops.operands import flatten_stack
from .ops.panel_qr import MAX_PANEL_ROWS, panel_qr
from .ops.small_svd import MAX_SVD_COLUMNS, small_svd
from .precision import EPS32, in_full_precision, is_finite, working_dtype
from .rank_rule import columns_holding
from .svd.solvers import descending_eigh, eigenvalue_stack, try_solver
from .svd.stacks import is_on_host
from .validation import refuse_tangents


def core_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decomposes small matrices core [..., p, q] -> U, S, V.

    They are [..., p, d], [..., d] and [..., q, d].

    Raises:
        SolverFailure: the solver converged neither in this dtype nor in float64.
        NonFiniteWeights: the matrices hold NaN or Inf, and are too wide for the in-house solver.
    """
    if core.shape[-1] > core.shape[-2]:
        v, s, u = core_svd(core.mT)
        return u, s, v
    svd = try_solver(lambda: _thin_svd(core)) or try_solver(lambda: _thin_svd(core.double()))
    if svd is not None:
        u, s, v = (x.to(core.dtype) for x in svd)
        return u, s, v
    if not is_finite(core):
        raise NonFiniteWeights("NaN or Inf in a product of thin factors")
    raise SolverFailure("the SVD of a small matrix of finite numbers did not converge")


def _thin_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U, S and V of core [..., p, q], q ≤ p."""
    if core.shape[-1] <= MAX_SVD_COLUMNS:
        return small_svd(core)
    if core.dtype == torch.float32 and not is_on_host(core):
        return _svd_by_gram(core)
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    return u, s, vt.mT


def _svd_by_gram(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `_thin_svd` of a float32 stack by float64 eigenvectors of coreᵀcore.

    What squaring loses lies below float32's rounding of the largest singular value: values of at
    most q·eps of it come back as 0, with a zero column in U, as `small_svd` gives them. Matrices
    that the batched solver fails on are done one by one.
    """
    stack = flatten_stack(core)
    # A power of two: no square over- or underflows in float64, and no digit changes.
    exponent = torch.frexp(stack.abs().amax((1, 2)))[1]
    exact = torch.ldexp(stack.double(), -exponent[:, None, None])
    squares, v = descending_eigh(exact.mT @ exact)
    s = squares.clamp_min(0).sqrt()
    noise = s <= core.shape[-1] * EPS32 * s[:, :1]
    u = (exact @ v / torch.where(noise, 1, s)[:, None]).masked_fill(noise[:, None], 0)
    s = torch.ldexp(s.masked_fill(noise, 0), exponent[:, None])
    u, s, v = (x.to(core.dtype) for x in (u, s, v))
    failed = s.isfinite().all(1).logical_not().nonzero().flatten().tolist()
    if failed:
        again, values, vt = torch.linalg.svd(stack[failed], full_matrices=False)
        u[failed], s[failed], v[failed] = again, values, vt.mT
    lead = core.shape[:-2]
    return u.reshape(core.shape), s.reshape(*lead, -1), v.reshape(*lead, *v.shape[1:])


@in_full_precision
def product_energies(up: Tensor, down: Tensor) -> Tensor:
    """Computes σ² [..., r] of up @ down in float64, descending.

    Without vectors it takes a third of the time. The values are the eigenvalues of Hᵀ(down·downᵀ)H
    with HHᵀ = upᵀup, which are r×r. Errors are float64's in ‖up‖²‖down‖²: what squaring loses of a
    small σ is nothing of the energy.

    up: [..., m, r]; down: [..., r, n].
    """
    up, down = up.detach().double(), down.detach().double()
    left, right = up.mT @ up, down @ down.mT
    values, vectors = descending_eigh(flatten_stack(left))
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    energies = eigenvalue_stack(root.mT @ flatten_stack(right) @ root)
    if not bool(energies.isfinite().all()):
        raise SolverFailure("the eigenvalues of a product of thin factors did not converge")
    return energies.clamp_min(0).reshape(left.shape[:-1])


@dataclass(frozen=True)
class ProductSvd:
    """The thin SVD of a product, not multiplied out: (Lᵀ u) diag(s) (Rᵀ v)ᵀ."""

    left: Tensor  # L [..., d, m], rows
    u: Tensor  # [..., d, c]; Lᵀ u has orthonormal columns
    s: Tensor  # [..., c], descending
    v: Tensor  # [..., d', c]
    right: Tensor  # R [..., d', n], rows; Rᵀ v has orthonormal columns


def orthonormalise_factor(panel: Tensor) -> tuple[Tensor, Tensor]:
    """Splits panel [..., r, m] = L Q into orthonormal rows Q and L.

    Q is [..., d, m], L [..., r, d], d ≤ min(r, m). float32 goes through `panel_qr`, whatever that
    cannot do through Householder reflections. Rows that the others span leave zeros in Q.
    """
    r, m = panel.shape[-2:]
    if panel.dtype == torch.float32 and r <= min(m, MAX_PANEL_ROWS):
        q, lower, rank = panel_qr(panel)
        failed = rank < 0
        if failed.any():
            # NaN and Inf among them stay what they are.
            again, upper = torch.linalg.qr(panel[failed].mT)
            q[failed], lower[failed] = again.mT, upper.mT
        return q, lower
    q, upper = torch.linalg.qr(panel.mT)
    return q.mT, upper.mT


def factor_product(up: Tensor, down: Tensor) -> ProductSvd:
    """Decomposes up @ down: orthonormal rows of both factors, then a small core.

    Values alone: where singular values meet, their vectors have no gradient.

    up: [..., m, r]; down: [..., r, n].
    """
    q_up, l_up = orthonormalise_factor(up.detach().mT)
    q_down, l_down = orthonormalise_factor(down.detach())
    u, s, v = core_svd(l_up.mT @ l_down)
    return ProductSvd(q_up, u, s, v, q_down)


def factor_product_by_grams(
    up: Tensor, down: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32
) -> ProductSvd:
    """Computes `factor_product` from the known XXᵀ of the factors' rows.

    No factor is made orthonormal: with XXᵀ = LLᵀ the rows of L⁻¹X are, and L⁻¹ goes into the small
    matrices. float64 carries that as long as no row lies within `_TOO_CLOSE` of the span of the
    rows above it, relative to its length; such matrices, and all with more rows than columns, go
    through `factor_product`.

    up: upᵀ as rows [b, r, m], float64; down: [b, r, n], float64; left: upᵀup [b, r, r], float64;
    right: down·downᵀ [b, r, r], float64; dtype: of the factors as they came; the singular values
    are exact to it.
    """
    if up.shape[-2] > min(up.shape[-1], down.shape[-1]):
        wide = factor_product(up.to(dtype).mT, down.to(dtype))
        return ProductSvd(*(x.double() for x in (wide.left, wide.u, wide.s, wide.v, wide.right)))
    (low_up, bad_up), (low_down, bad_down) = _cholesky_factors(left), _cholesky_factors(right)
    u, s, v = core_svd((low_up.mT @ low_down).to(dtype))
    u = torch.linalg.solve_triangular(low_up.mT, u.double(), upper=True)
    v = torch.linalg.solve_triangular(low_down.mT, v.double(), upper=True)
    bad = bad_up | bad_down
    if bad.any():
        again = factor_product(up[bad].to(dtype).mT, down[bad].to(dtype))
        up, down = up.clone(), down.clone()
        up[bad], u[bad], s[bad] = again.left.double(), again.u.double(), again.s
        down[bad], v[bad] = again.right.double(), again.v.double()
    return ProductSvd(up, u, s.double(), v, down)


# One Cholesky factorisation in float64 takes rows down to this sine between a row and the span of
# those above it. Orthogonality suffers by the inverse square of the sine, times 1e-16.
_TOO_CLOSE = 1e-4


def _cholesky_factors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Cholesky factors of gram [b, r, r], and where they are unusable: identities."""
    lower, info = torch.linalg.cholesky_ex(gram)
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    close = lower.diagonal(dim1=-2, dim2=-1) < _TOO_CLOSE * lengths
    bad = (info != 0) | close.any(-1) | (lengths == 0).any(-1)
    if bad.any():
        lower[bad] = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return lower, bad


@in_full_precision
def product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the thin SVD of up @ down.

    up: [..., m, r]; down: [..., r, n]. Returns U [..., m, d], S [..., d] in descending order and V
    [..., n, d], d ≤ r. Where a singular value is zero the columns of U or V carry no meaning.
    """
    svd = factor_product(up, down)
    return svd.left.mT @ svd.u, svd.s, svd.right.mT @ svd.v


def merge_products(
    parts: list[ProductSvd], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns balanced factors of a sum of parts with orthogonal columns and rows.

    The two halves of ProLoRA are such parts (docs/method.md §1: range and complement of the same
    target basis), so the SVD of the sum is the union of their SVDs, and twice the width is never
    factorised.

    parts: SVDs, of shapes that agree but for the numbers of rows and columns; dtype: of the result.
    Returns (U√S)ᵀ [..., c, m], S [..., c] and √S·Vᵀ [..., c, n], part by part; and the order of
    their rows in which S descends, int64 [..., c].
    """
    s = torch.cat([part.s for part in parts], -1)
    order = torch.sort(s, dim=-1, descending=True, stable=True)[1]

    def rows(cores: list[Tensor], sides: list[Tensor]) -> Tensor:
        roots = [part.s.clamp_min(0).sqrt().unsqueeze(-1) for part in parts]
        rows = [
            (core.mT * root) @ side for core, root, side in zip(cores, roots, sides, strict=True)
        ]
        return torch.cat([part.to(dtype) for part in rows], -2)

    left = rows([part.u for part in parts], [part.left for part in parts])
    right = rows([part.v for part in parts], [part.right for part in parts])
    return left, s, right, order


def balance_factors(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Factors U√S [..., m, d] and √S·Vᵀ [..., d, n]: equal norms are kindest to half precision."""
    root = s.clamp_min(0).sqrt()
    return u * root.unsqueeze(-2), (v * root.unsqueeze(-2)).mT


@in_full_precision
def recompress_factors(
    up: Tensor, down: Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the best factors of up @ down at a lower rank (Eckart–Young).

    up: [..., m, r]; down: [..., r, n]; rank: at most this many columns; energy: the fewest columns
    that hold this share of Σσ² for every matrix of the stack. Returns balanced factors [..., m, d]
    and [..., d, n], in the dtype of the given ones.

    Raises:
        ValueError: rank < 1, or energy outside (0, 1].
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], not {energy}")
    refuse_tangents("a truncation", up, down)
    work = working_dtype(up.dtype)
    u, s, v = product_svd(up.to(work), down.to(work))
    keep = s.shape[-1]
    if energy is not None and s.numel():
        keep = int(columns_holding(s, energy).max())
    if rank is not None:
        keep = min(keep, rank)
    new_up, new_down = balance_factors(u[..., :keep], s[..., :keep], v[..., :keep])
    return new_up.to(up.dtype), new_down.to(down.dtype)
