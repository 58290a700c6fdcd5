"""tridiagonalise, tridiagonal_values, tridiagonal_vectors: leading eigenpairs in three steps.

They run in the extension on a CPU alone, among steps that look at numbers: so torch does not know
them, and where there is no extension a dense solver does their work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from . import native

MAX_COLUMNS = 16384
"""kMaxTridiagonal in csrc/ops.h."""


def tridiagonalise(symmetric: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduces symmetric matrices to tridiagonal ones by reflections: A = Q T Qᵀ.

    symmetric: [b, d, d], float32 or float64; only the upper triangle is read. Returns the
    reflections [b, d, d] (that of column j in row j from j + 2 on, 1 before it) and their scales
    [b, d], as `torch.ormqr` takes them transposed; and T: its diagonal and, with a 0 behind them,
    the entries beside it, float64 [b, d] each.

    Raises:
        TypeError: another dtype.
        ShapeMismatch: no stack of square matrices, or more than 16384 columns.
    """
    if symmetric.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"tridiagonalise: takes float32 or float64, not {symmetric.dtype}")
    d, wide = symmetric.shape[-1], torch.float64
    if symmetric.ndim != 3 or symmetric.shape[1] != d or not 1 <= d <= MAX_COLUMNS:
        raise ShapeMismatch(
            f"tridiagonalise: takes [b, d, d] with 1 <= d <= {MAX_COLUMNS}, "
            f"not {tuple(symmetric.shape)}"
        )
    b = len(symmetric)
    a = symmetric.clone(memory_format=torch.contiguous_format)
    kernels, tau = native.require_extension(), a.new_empty(b, d)
    diagonal, beside = a.new_empty(b, d, dtype=wide), a.new_empty(b, d, dtype=wide)
    size = kernels.tridiagonalise_scratch(b, d, a.dtype == wide)
    scratch = torch.empty(size, dtype=torch.uint8)
    tensors = {"a": a, "tau": tau, "diagonal": diagonal, "beside": beside, "scratch": scratch}
    sizes = {"batch": b, "d": d}
    native.run_kernel(kernels, "tridiagonalise", False, a.dtype == wide, tensors, sizes)
    return a, tau, diagonal, beside


def tridiagonal_values(diagonal: Tensor, beside: Tensor, count: int) -> Tensor:
    """Computes the largest eigenvalues of tridiagonal matrices, to 1e-14 of the largest one.

    diagonal, beside: [b, d], as of `tridiagonalise`. Returns [b, count], descending.

    Raises:
        TypeError: a dtype other than float64.
        ShapeMismatch: shapes that do not agree, or more values than columns.
    """
    values = diagonal.new_empty(len(diagonal), count)
    _run("tridiagonal_values", diagonal, beside, {"values": values})
    return values


def tridiagonal_vectors(
    diagonal: Tensor,
    beside: Tensor,
    values: Tensor,
    reflections: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Computes unit eigenvectors for some eigenvalues of T, or of A = Q T Qᵀ.

    Vectors of eigenvalues that agree to 1e-12 of the largest may be far from orthogonal.

    Args:
        diagonal: [b, d], as of `tridiagonalise`.
        beside: [b, d], likewise.
        values: [b, count], eigenvalues in any order.
        reflections: [b, d, d] float64, as of `tridiagonalise`: the vectors are those of A. None:
            those of T.
        scales: [b, d], likewise.

    Returns:
        Rows [b, count, d], float64. Raises as `tridiagonal_values`.
    """
    vectors = diagonal.new_empty(*values.shape, diagonal.shape[-1])
    further = {"values": values.contiguous(), "reflections": reflections, "tau": scales}
    _run("tridiagonal_vectors", diagonal, beside, further | {"vectors": vectors})
    return vectors


def multiply_reduced(
    reflections: Tensor, scales: Tensor, diagonal: Tensor, beside: Tensor, x: Tensor
) -> Tensor:
    """Multiplies rows x [count, d] by Q T Qᵀ of each reduction: [b, count, d], float64.

    The difference from products with the reduced matrix is the error of the reduction.
    """
    b, d = diagonal.shape
    products = diagonal.new_empty(b, *x.shape)
    tensors = {"reflections": reflections, "tau": scales, "diagonal": diagonal, "beside": beside}
    tensors |= {"x": x.contiguous(), "products": products}
    sizes = {"batch": b, "d": d, "count": len(x)}
    kernels = native.require_extension()
    native.run_kernel(kernels, "multiply_reduced", False, True, tensors, sizes)
    return products


def _run(op: str, diagonal: Tensor, beside: Tensor, further: dict[str, Tensor | None]) -> None:
    values = further["values"]
    assert values is not None
    d, count = diagonal.shape[-1], values.shape[1]
    if diagonal.dtype != torch.float64 or beside.dtype != torch.float64:
        raise TypeError("tridiagonal: the diagonal and beside must be float64")
    if diagonal.ndim != 2 or beside.shape != diagonal.shape or d < 1 or not 0 <= count <= d:
        raise ShapeMismatch(
            f"tridiagonal: takes two [b, d] and at most d values, not {tuple(diagonal.shape)}, "
            f"{tuple(beside.shape)} and {count}"
        )
    ends = {"diagonal": diagonal.contiguous(), "beside": beside.contiguous()}
    sizes = {"batch": len(diagonal), "d": d, "count": count}
    native.run_kernel(native.require_extension(), op, False, True, ends | further, sizes)
