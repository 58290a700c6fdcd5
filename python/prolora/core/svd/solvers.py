"""LAPACK, cuSOLVER and what replaces them, as solvers that may fail: caught and measured here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..arrays import to_tensor

Out = TypeVar("Out")
# Random vectors that the orthonormality of many columns is judged by.
PROBES = 32
# How far (Frobenius) the eigenvectors of a solver that works may be from orthonormal: in float64,
# and in float32, where eight times what was seen at d = 3072 still is far from wrong.
SKEW_64 = 1e-9
SKEW_32 = 1e-3


def attempt(solve: Callable[[], Out]) -> Out | None:
    """The result of a solver, None where it did not converge.

    torch raises LinAlgError for that, which is a RuntimeError, and on some devices a plain
    RuntimeError. Too little memory is an error of another kind.
    """
    try:
        return solve()
    except RuntimeError as error:
        if "memory" in str(error).lower():
            raise
        return None


def eigh_stack(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of a stack [..., d, d], through CuPy's batched solver on a GPU.

    torch loops over the matrices on a GPU; CuPy, where it is installed, hands the stack to
    cuSOLVER as one. Both read the lower triangle.
    """
    if symmetric.is_cuda and symmetric.ndim > 2 and len(symmetric) > 1:
        try:
            import cupy
        except ImportError:
            pass
        else:
            stream = torch.cuda.current_stream(symmetric.device).cuda_stream
            with cupy.cuda.Device(symmetric.device.index), cupy.cuda.ExternalStream(stream):
                pair = cupy.linalg.eigh(cupy.from_dlpack(symmetric.contiguous()), UPLO="L")
                values, vectors = (to_tensor(x) for x in pair)
            return values, vectors
    values, vectors = torch.linalg.eigh(symmetric)
    return values, vectors


def descending_eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """`eigh_stack` of [b, d, d] by descending eigenvalue; NaN for a matrix that it fails on."""
    pair = attempt(lambda: eigh_stack(symmetric))
    if pair is None and len(symmetric) > 1:
        parts = [descending_eigh(one[None]) for one in symmetric]
        values, vectors = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        return values, vectors
    if pair is None:
        unknown = torch.full_like(symmetric, torch.nan)
        return unknown[..., 0], unknown
    return pair[0].flip(-1), pair[1].flip(-1)


def full_svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Thin SVD of w [d, n], d ≤ n, as U [d, d], S [d], V [n, d]; None where it fails."""
    svd = attempt(lambda: torch.linalg.svd(w, full_matrices=False))
    if svd is None or not all(bool(x.isfinite().all()) for x in svd):
        return None
    u, s, vt = svd
    return u, s, vt.mT


def estimate_skew(x: Tensor, used: Tensor | None = None) -> Tensor:
    """‖xᵀx − I‖_F of x [..., m, k], float64 [...]; an upper estimate where k is large.

    ‖EΩ‖_F²/c has the expectation ‖E‖_F² for Ω of c normal columns, and falls short of a quarter of
    it with a chance below 1e-6 for c = 32.

    Args:
        x: columns.
        used: bool [..., k], which of them are in use; the others are zero.
    """
    k = x.shape[-1]
    if k <= 4 * PROBES:
        excess = x.mT @ x
        excess.diagonal(dim1=-2, dim2=-1).sub_(1 if used is None else used.to(x.dtype))
        exact: Tensor = torch.linalg.vector_norm(excess, dim=(-2, -1)).double()
        return exact
    generator = torch.Generator("cpu").manual_seed(0)
    probes = torch.randn(k, PROBES, generator=generator, dtype=torch.float32, device="cpu")
    probes = probes.to(x)
    wanted = probes if used is None else probes * used[..., None]
    missed = x.mT @ (x @ probes) - wanted
    sampled: Tensor = torch.linalg.vector_norm(missed, dim=(-2, -1)).double()
    return 2 * sampled / math.sqrt(PROBES)
