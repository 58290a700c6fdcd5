"""tridiagonalise, tridiagonal_values, tridiagonal_vectors: leading eigenpairs in three steps."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from . import native, torch_twin
from .operands import ANY_DEVICE, NAMESPACE, library, registered

MAX_COLUMNS = 16384
"""kMaxTridiagonal in csrc/ops.h."""

library.define("tridiagonalise(Tensor symmetric) -> (Tensor, Tensor, Tensor, Tensor)")
library.define("tridiagonal_values(Tensor diagonal, Tensor beside, int count) -> Tensor")
library.define("tridiagonal_vectors(Tensor diagonal, Tensor beside, Tensor values) -> Tensor")


def run_tridiagonalise(
    kernels: ModuleType, symmetric: Tensor, cuda: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the kernel on a copy of symmetric [b, d, d]."""
    b, d, _ = symmetric.shape
    a = symmetric.clone(memory_format=torch.contiguous_format)
    tau, wide = a.new_empty(b, d), torch.float64
    diagonal, beside = a.new_empty(b, d, dtype=wide), a.new_empty(b, d, dtype=wide)
    size = kernels.tridiagonalise_scratch(b, d, a.dtype == wide)
    scratch = torch.empty(size, dtype=torch.uint8, device=a.device)
    native.run_kernel(kernels, "tridiagonalise", (a, tau, diagonal, beside, scratch), (b, d), cuda)
    return a, tau, diagonal, beside


def run_tridiagonal_values(
    kernels: ModuleType, diagonal: Tensor, beside: Tensor, count: int, cuda: bool
) -> Tensor:
    """Runs the kernel on T [b, d] -> [b, count]."""
    b, d = diagonal.shape
    values = diagonal.new_empty(b, count)
    tensors = (diagonal.contiguous(), beside.contiguous(), values)
    native.run_kernel(kernels, "tridiagonal_values", tensors, (b, d, count), cuda)
    return values


def run_tridiagonal_vectors(
    kernels: ModuleType, diagonal: Tensor, beside: Tensor, values: Tensor, cuda: bool
) -> Tensor:
    """Runs the kernel on T [b, d] and values [b, count] -> [b, count, d]."""
    (b, d), count = diagonal.shape, values.shape[1]
    vectors = diagonal.new_empty(b, count, d, dtype=torch.float32)
    scratch = diagonal.new_empty(3 * b * d * count if cuda else 0)
    tensors = (diagonal.contiguous(), beside.contiguous(), values.contiguous(), scratch, vectors)
    native.run_kernel(kernels, "tridiagonal_vectors", tensors, (b, d, count), cuda)
    return vectors


def check_symmetric(symmetric: Tensor) -> None:
    """Refuses what would be read wrongly."""
    if symmetric.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"tridiagonalise: takes float32 or float64, not {symmetric.dtype}")
    d = symmetric.shape[-1]
    if symmetric.ndim != 3 or symmetric.shape[1] != d or not 1 <= d <= MAX_COLUMNS:
        raise ShapeMismatch(
            f"tridiagonalise: takes [b, d, d] with 1 <= d <= {MAX_COLUMNS}, "
            f"not {tuple(symmetric.shape)}"
        )


def check_tridiagonal(diagonal: Tensor, beside: Tensor, count: int) -> None:
    """Refuses what would be read wrongly."""
    for name, x in (("diagonal", diagonal), ("beside", beside)):
        if x.dtype != torch.float64 or x.device != diagonal.device:
            raise TypeError(f"tridiagonal: {name} must be float64 on {diagonal.device}")
    d = diagonal.shape[-1]
    if diagonal.ndim != 2 or beside.shape != diagonal.shape or d < 1 or not 0 <= count <= d:
        raise ShapeMismatch(
            f"tridiagonal: takes two [b, d] and at most d values, not {tuple(diagonal.shape)}, "
            f"{tuple(beside.shape)} and {count}"
        )


def _tridiagonalise(symmetric: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_symmetric(symmetric)
    both = run_tridiagonalise, torch_twin.tridiagonalise
    sizes = symmetric.shape
    return native.run_best("tridiagonalise", symmetric, sizes, *both, (symmetric,), _compare)


def _compare(found: tuple[Tensor, ...]) -> list[Tensor]:
    """Computes what does not depend on how rounding has turned the reflections."""
    return [found[2].sum(1), (found[2].square() + 2 * found[3].square()).sum(1).sqrt()]


def _tridiagonal_values(diagonal: Tensor, beside: Tensor, count: int) -> Tensor:
    check_tridiagonal(diagonal, beside, count)
    both = run_tridiagonal_values, torch_twin.tridiagonal_values
    sizes, operands = (*diagonal.shape, count), (diagonal, beside, count)
    return native.run_best(
        "tridiagonal_values", diagonal, sizes, *both, operands, lambda values: [values]
    )


def _tridiagonal_vectors(diagonal: Tensor, beside: Tensor, values: Tensor) -> Tensor:
    check_tridiagonal(diagonal, beside, values.shape[1])
    both = run_tridiagonal_vectors, torch_twin.tridiagonal_vectors
    sizes, operands = (*diagonal.shape, values.shape[1]), (diagonal, beside, values)
    return native.run_best(
        "tridiagonal_vectors", diagonal, sizes, *both, operands, lambda x: [x.abs()], native.FAR_32
    )


def _tridiagonalise_fake(symmetric: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_symmetric(symmetric)
    b, d, _ = symmetric.shape
    tau, wide = symmetric.new_empty(b, d), torch.float64
    ends = (symmetric.new_empty(b, d, dtype=wide), symmetric.new_empty(b, d, dtype=wide))
    return symmetric.new_empty(b, d, d), tau, *ends


def _tridiagonal_values_fake(diagonal: Tensor, beside: Tensor, count: int) -> Tensor:
    return diagonal.new_empty(len(diagonal), count)


def _tridiagonal_vectors_fake(diagonal: Tensor, beside: Tensor, values: Tensor) -> Tensor:
    return diagonal.new_empty(*values.shape, diagonal.shape[1], dtype=torch.float32)


for _name, _run, _fake in (
    ("tridiagonalise", _tridiagonalise, _tridiagonalise_fake),
    ("tridiagonal_values", _tridiagonal_values, _tridiagonal_values_fake),
    ("tridiagonal_vectors", _tridiagonal_vectors, _tridiagonal_vectors_fake),
):
    library.impl(_name, _run, ANY_DEVICE)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)


def tridiagonalise(symmetric: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduces symmetric matrices to tridiagonal ones by reflections: A = Q T Qᵀ.

    symmetric: [b, d, d], float32 or float64; only the upper triangle is read. Returns the
    reflections [b, d, d] (that of column j in row j from j + 2 on, 1 before it) and their scales
    [b, d], as `torch.ormqr` takes them transposed; and T: its diagonal and, with a 0 behind them,
    the entries beside it, float64 [b, d] each. Not differentiable.

    Raises:
        TypeError: another dtype.
        ShapeMismatch: no stack of square matrices, or more than 16384 columns.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = registered.tridiagonalise(symmetric)
    return result


def tridiagonal_values(diagonal: Tensor, beside: Tensor, count: int) -> Tensor:
    """Computes the largest eigenvalues of tridiagonal matrices, to 1e-14 of the largest one.

    diagonal, beside: [b, d], as of `tridiagonalise`. Returns [b, count], descending.

    Raises:
        TypeError: a dtype other than float64, or two devices.
        ShapeMismatch: shapes that do not agree, or more values than columns.
    """
    values: Tensor = registered.tridiagonal_values(diagonal, beside, count)
    return values


def tridiagonal_vectors(diagonal: Tensor, beside: Tensor, values: Tensor) -> Tensor:
    """Computes unit eigenvectors of tridiagonal matrices for some of their eigenvalues.

    Vectors of values that agree to 1e-12 of the largest may be far from orthogonal.

    diagonal, beside: [b, d], as of `tridiagonalise`; values: [b, count], the largest ones. Returns
    rows [b, count, d], float32. Raises as `tridiagonal_values`.
    """
    vectors: Tensor = registered.tridiagonal_vectors(diagonal, beside, values)
    return vectors
