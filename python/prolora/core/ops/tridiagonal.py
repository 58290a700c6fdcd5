"""tridiagonalise, tridiagonal_values, tridiagonal_vectors: leading eigenpairs in three steps.

They run on a CPU alone, among steps that look at numbers, and so are not registered with torch.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from . import native

MAX_COLUMNS = 16384
"""kMaxTridiagonal in csrc/ops.h."""


def run_tridiagonalise(
    kernels: ModuleType, symmetric: Tensor, cuda: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the extension on a copy of symmetric [b, d, d]."""
    b, d, _ = symmetric.shape
    a = symmetric.clone(memory_format=torch.contiguous_format)
    tau, wide = a.new_empty(b, d), torch.float64
    diagonal, beside = a.new_empty(b, d, dtype=wide), a.new_empty(b, d, dtype=wide)
    size = kernels.tridiagonalise_scratch(b, d, a.dtype == wide)
    tensors = {
        "a": a,
        "tau": tau,
        "diagonal": diagonal,
        "beside": beside,
        "scratch": torch.empty(size, dtype=torch.uint8, device=a.device),
    }
    sizes = {"batch": b, "d": d}
    native.run_kernel(kernels, "tridiagonalise", cuda, a.dtype == wide, tensors, sizes)
    return a, tau, diagonal, beside


def run_tridiagonal_values(
    kernels: ModuleType, diagonal: Tensor, beside: Tensor, count: int, cuda: bool
) -> Tensor:
    """Runs the extension on T [b, d] -> [b, count]."""
    b, d = diagonal.shape
    values = diagonal.new_empty(b, count)
    tensors = {"diagonal": diagonal.contiguous(), "beside": beside.contiguous(), "values": values}
    sizes = {"batch": b, "d": d, "count": count}
    native.run_kernel(kernels, "tridiagonal_values", cuda, True, tensors, sizes)
    return values


def run_tridiagonal_vectors(
    kernels: ModuleType, diagonal: Tensor, beside: Tensor, values: Tensor, cuda: bool
) -> Tensor:
    """Runs the extension on T [b, d] and values [b, count] -> [b, count, d]."""
    (b, d), count = diagonal.shape, values.shape[1]
    vectors = diagonal.new_empty(b, count, d, dtype=torch.float32)
    tensors = {
        "diagonal": diagonal.contiguous(),
        "beside": beside.contiguous(),
        "values": values.contiguous(),
        "vectors": vectors,
    }
    sizes = {"batch": b, "d": d, "count": count}
    native.run_kernel(kernels, "tridiagonal_vectors", cuda, True, tensors, sizes)
    return vectors


def reduce_in_turn(symmetric: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduces [b, d, d] by one reflection after the other; what each step does, to read."""
    a = symmetric.triu() + symmetric.triu(1).mT
    b, d, _ = a.shape
    tau = a.new_zeros(b, d)
    for j in range(d - 1):
        x = a[:, j, j + 1 :].clone()
        length = torch.copysign(torch.linalg.vector_norm(x, dim=1), -x[:, 0])
        none = (x[:, 1:] == 0).all(1)
        length = torch.where(none, x[:, 0], length)
        v = torch.where(none, 0.0, x.T / (x[:, 0] - length)).T
        v[:, 0] = 1
        tau[:, j] = torch.where(none, 0.0, (length - x[:, 0]) / length)
        scaled, rest = v * tau[:, j, None], a[:, j + 1 :, j + 1 :]
        p = (rest @ scaled[..., None])[..., 0]
        w = p - scaled * ((p * v).sum(1, keepdim=True) / 2)
        outer = v[:, :, None] * w[:, None]
        rest -= outer + outer.mT
        a[:, j, j + 1] = a[:, j + 1, j] = length
        a[:, j, j + 2 :] = v[:, 1:]
    beside = torch.nn.functional.pad(a.diagonal(1, 1, 2), (0, 1))
    diagonal = a.diagonal(dim1=1, dim2=2).to(torch.float64, copy=True)  # an op's outputs share none
    return a, tau, diagonal, beside.double()


def values_of_lapack(diagonal: Tensor, beside: Tensor, count: int) -> Tensor:
    """Returns the largest eigenvalues [b, count] of T, descending."""
    lower = torch.diag_embed(diagonal) + torch.diag_embed(beside[:, :-1], -1)
    values: Tensor = torch.linalg.eigvalsh(lower)
    return values.flip(1)[:, :count].contiguous()


def vectors_of_lapack(diagonal: Tensor, beside: Tensor, values: Tensor) -> Tensor:
    """Returns eigenvectors of T as rows [b, count, d], float32, of its largest eigenvalues."""
    lower = torch.diag_embed(diagonal) + torch.diag_embed(beside[:, :-1], -1)
    vectors: Tensor = torch.linalg.eigh(lower)[1]
    return vectors.flip(2)[:, :, : values.shape[1]].mT.float().contiguous()


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


for _name, _run, _twin in (
    ("tridiagonalise", run_tridiagonalise, reduce_in_turn),
    ("tridiagonal_values", run_tridiagonal_values, values_of_lapack),
    ("tridiagonal_vectors", run_tridiagonal_vectors, vectors_of_lapack),
):
    native.OPS[_name] = native.Op(_run, _twin, on_gpu="cuSOLVER is faster on a GPU")


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
    check_symmetric(symmetric)
    result: tuple[Tensor, Tensor, Tensor, Tensor]
    result = native.run_best("tridiagonalise", symmetric, (), symmetric)
    return result


def tridiagonal_values(diagonal: Tensor, beside: Tensor, count: int) -> Tensor:
    """Computes the largest eigenvalues of tridiagonal matrices, to 1e-14 of the largest one.

    diagonal, beside: [b, d], as of `tridiagonalise`. Returns [b, count], descending.

    Raises:
        TypeError: a dtype other than float64, or two devices.
        ShapeMismatch: shapes that do not agree, or more values than columns.
    """
    check_tridiagonal(diagonal, beside, count)
    values: Tensor = native.run_best("tridiagonal_values", diagonal, (), diagonal, beside, count)
    return values


def tridiagonal_vectors(diagonal: Tensor, beside: Tensor, values: Tensor) -> Tensor:
    """Computes unit eigenvectors of tridiagonal matrices for some of their eigenvalues.

    Vectors of values that agree to 1e-12 of the largest may be far from orthogonal.

    diagonal, beside: [b, d], as of `tridiagonalise`; values: [b, count], the largest ones. Returns
    rows [b, count, d], float32. Raises as `tridiagonal_values`.
    """
    check_tridiagonal(diagonal, beside, values.shape[1])
    vectors: Tensor
    vectors = native.run_best("tridiagonal_vectors", diagonal, (), diagonal, beside, values)
    return vectors
