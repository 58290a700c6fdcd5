"""LAPACK and cuSOLVER, as solvers that may fail: caught and measured here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .products import multiply_narrow
from .stacks import is_on_host

Out = TypeVar("Out")
# Random vectors that the orthonormality of many columns is judged by.
PROBES = 32
# As many tell a result that is wrong from one that is not.
FEW_PROBES = 16
# How far (Frobenius) the eigenvectors of a solver that works may be from orthonormal, and their
# residuals from zero relative to the matrix: in float64, and in float32, where eight times what was
# seen at d = 3072 still is far from wrong.
SKEW_64 = 1e-9
SKEW_32 = 1e-3


def try_solver(solve: Callable[[], Out]) -> Out | None:
    """Returns the result of a solver, or None if it did not converge.

    torch raises LinAlgError for that, or a RuntimeError in cuSOLVER's words. Every other error is
    raised: a mistake, a kernel that did not run, too little memory.
    """
    try:
        return solve()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    except RuntimeError as error:
        if not str(error).startswith("cusolver") or "ALLOC_FAILED" in str(error):
            raise
        return None


def descending_eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of [b, d, d] by descending eigenvalue, checked.

    On a GPU in one batched call, if torch is 2.12 or later: earlier ones go matrix by matrix.

    symmetric: float32 or float64; only the lower triangle is read. Returns values [b, d] and
    vectors [b, d, d] as columns; NaN for a matrix that the solver failed on, and where the vectors
    are not orthonormal or do not belong to the matrix.
    """
    return measured_eigh(symmetric)[:2]


def measured_eigh(symmetric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `descending_eigh` and an upper estimate of ‖VᵀV − I‖_F, float64 [b]."""
    values, vectors = _solve_stack(symmetric, with_vectors=True)
    lower = symmetric.tril()
    norm, allowed = _symmetric_norm(lower), _allowed_error(symmetric)
    skew, residual = _measure_pairs(lower, values, vectors)
    # Comparisons with NaN are false.
    trusted = norm.isfinite() & (skew <= allowed) & (residual <= allowed * norm)
    vectors = vectors.flip(-1)
    if not is_on_host(trusted) or not bool(trusted.all()):
        vectors.masked_fill_(~trusted[:, None, None], torch.nan)
    return torch.where(trusted[:, None], values, torch.nan).flip(-1), vectors, skew


def eigenvalue_stack(symmetric: Tensor) -> Tensor:
    """Eigenvalues [b, d] of [b, d, d], descending: `descending_eigh` without the vectors.

    NaN for a matrix that the solver failed on, and where the sum of the values or of their squares
    is not that of the matrix.
    """
    values, _ = _solve_stack(symmetric, with_vectors=False)
    lower = symmetric.tril()
    norm, allowed = _symmetric_norm(lower), _allowed_error(symmetric)
    trace = lower.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=norm.dtype)
    trace_error = (values.sum(-1, dtype=norm.dtype) - trace).abs()
    norm_error = (torch.linalg.vector_norm(values, dim=-1, dtype=norm.dtype) - norm).abs()
    trusted = norm.isfinite() & (norm_error <= allowed * norm)
    trusted &= trace_error <= allowed * math.sqrt(symmetric.shape[-1]) * norm
    return torch.where(trusted[:, None], values, torch.nan).flip(-1)


def _solve_stack(symmetric: Tensor, with_vectors: bool) -> tuple[Tensor, Tensor]:
    """Returns ascending values and vectors as columns (or none); values of NaN where it failed."""
    # What a GPU's solver does with NaN and Inf nobody says; a CPU's refuses them.
    finite = symmetric if symmetric.is_cpu else symmetric.nan_to_num(0.0, 0.0, 0.0)

    def solve() -> tuple[Tensor, Tensor]:
        if with_vectors:
            values, vectors = torch.linalg.eigh(finite)
            return values, vectors
        return torch.linalg.eigvalsh(finite), symmetric

    pair = try_solver(solve)
    if pair is None and len(symmetric) > 1:
        parts = [_solve_stack(one[None], with_vectors) for one in symmetric]
        values, vectors = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        return values, vectors
    return (torch.full_like(symmetric[..., 0], torch.nan), symmetric) if pair is None else pair


def full_svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Computes the thin SVD of w [d, n], d ≤ n; None if it fails.

    U [d, d], S [d], V [n, d].
    """
    svd = try_solver(lambda: torch.linalg.svd(w, full_matrices=False))
    if svd is None or not all(bool(x.isfinite().all()) for x in svd):
        return None
    u, s, vt = svd
    return u, s, vt.mT


def estimate_skew(x: Tensor, used: Tensor | None = None) -> Tensor:
    """Measures ‖xᵀx − I‖_F of x [..., m, k], float64 [...]; an upper estimate for large k.

    ‖EΩ‖_F²/c has the expectation ‖E‖_F² for Ω of c normal columns, and falls short of a quarter of
    it with a chance of 5e-6 at most for c = 32: where E has rank one.

    x: columns; used: bool [..., k], which of them are in use; the others are zero.
    """
    k = x.shape[-1]
    if k <= 4 * PROBES:
        excess = x.mT @ x
        excess.diagonal(dim1=-2, dim2=-1).sub_(1 if used is None else used.to(x.dtype))
        exact: Tensor = torch.linalg.vector_norm(excess, dim=(-2, -1)).double()
        return exact
    probes = random_probes(k, PROBES, x.dtype, x.device)
    wanted = probes if used is None else probes * used[..., None]
    missed = x.mT @ (x @ probes) - wanted
    sampled: Tensor = torch.linalg.vector_norm(missed, dim=(-2, -1)).double()
    return 2 * sampled / math.sqrt(PROBES)


def _allowed_error(symmetric: Tensor) -> float:
    return SKEW_32 if symmetric.dtype == torch.float32 else SKEW_64


def _symmetric_norm(lower: Tensor) -> Tensor:
    """Returns ‖G‖_F, float64 [b], from its lower triangle [b, d, d], zeros above."""
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    half = torch.linalg.vector_norm(lower, dim=(-2, -1), dtype=torch.float64)
    twice = torch.linalg.vector_norm(diagonal, dim=-1, dtype=torch.float64)
    norm: Tensor = (2 * half.square() - twice.square()).sqrt()
    return norm


def _measure_pairs(lower: Tensor, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates ‖VᵀV − I‖_F and ‖GV − VΛ‖_F, float64 [b], as `estimate_skew` does.

    For 16 combinations that chance is 1e-3 where one column alone is wrong.
    """
    probes = random_probes(values.shape[-1], FEW_PROBES, values.dtype, values.device)
    both = torch.cat([probes.expand(len(values), -1, -1), values[..., None] * probes], -1)
    mixed, scaled = multiply_narrow(vectors, both).split(FEW_PROBES, -1)
    image = multiply_narrow(lower, mixed) + multiply_narrow(lower.mT, mixed)
    image -= lower.diagonal(dim1=-2, dim2=-1)[..., None] * mixed
    missed = (multiply_narrow(vectors.mT, mixed) - probes, image - scaled)
    skew, residual = (
        torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64) for x in missed
    )
    return 2 * skew / math.sqrt(FEW_PROBES), 2 * residual / math.sqrt(FEW_PROBES)


@functools.lru_cache(maxsize=64)
def random_probes(k: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Generates normal columns [k, count], the same in every call.

    They are kept because a copy to a GPU waits for the device.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    probes = torch.randn(k, count, generator=generator, dtype=torch.float32, device="cpu")
    return probes.to(device, dtype)
