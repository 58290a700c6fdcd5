"""small_svd: thin SVD of a stack of small matrices; small_singular_values: its values alone."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from . import native, torch_twin
from .operands import ANY_DEVICE, NAMESPACE, check_operands, flatten_stack, library, registered

MAX_SVD_COLUMNS = 128
"""kMaxSvdColumns in csrc/ops.h."""

# On a CPU LAPACK is faster beyond: speed of the extension over it on one core of an EPYC is 2.6 at
# 8 columns, 1.0 at 16, 0.85 at 24.
CPU_COLUMNS = 16

# Entries of a matrix that the kernels can count: their indices have 32 bits.
MAX_ENTRIES = 2**31 - 1

library.define("small_svd(Tensor a) -> (Tensor, Tensor, Tensor)")
library.define("small_singular_values(Tensor a) -> Tensor")


def run_small_svd(kernels: ModuleType, a: Tensor, cuda: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the kernel on a [b, m, n].

    It returns u [b, m, n], s [b, n] and v [b, n, n].
    """
    a = a.contiguous()
    b, m, n = a.shape
    u, s, v = torch.empty_like(a), a.new_empty(b, n), a.new_empty(b, n, n)
    scratch = _new_scratch(kernels, a, True, cuda)
    native.run_kernel(kernels, "small_svd", (a, u, s, v, scratch), (b, m, n), cuda)
    return u, s, v


def run_small_singular_values(kernels: ModuleType, a: Tensor, cuda: bool) -> Tensor:
    """Runs the kernel on a [b, m, n] -> s [b, n]."""
    a = a.contiguous()
    b, m, n = a.shape
    s, scratch = a.new_empty(b, n), _new_scratch(kernels, a, False, cuda)
    native.run_kernel(kernels, "small_singular_values", (a, s, scratch), (b, m, n), cuda)
    return s


def _new_scratch(kernels: ModuleType, a: Tensor, vectors: bool, cuda: bool) -> Tensor:
    with native.on_device(a):
        size = kernels.small_svd_scratch(*a.shape, vectors, a.dtype == torch.float64, cuda)
    return torch.empty(size, dtype=torch.uint8, device=a.device)


def _is_torchs(a: Tensor) -> bool:
    """Returns whether LAPACK is faster for a [b, m, n], or it is too large."""
    slower = a.device.type == "cpu" and a.shape[2] > CPU_COLUMNS
    return slower or a.shape[1] * a.shape[2] > MAX_ENTRIES


def _small_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if _is_torchs(a):
        return torch_twin.small_svd(a)
    both = run_small_svd, torch_twin.small_svd
    return native.run_best("small_svd", a, a.shape, *both, (a,), _compare)


def _compare(found: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    u, s, v = found
    return [(u * s[:, None]) @ v.mT, s]


def _small_singular_values(a: Tensor) -> Tensor:
    if _is_torchs(a):
        return torch_twin.small_singular_values(a)
    both = run_small_singular_values, torch_twin.small_singular_values
    return native.run_best("small_singular_values", a, a.shape, *both, (a,), lambda s: [s])


def _small_svd_fake(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, m, n = a.shape
    return a.new_empty(b, m, n), a.new_empty(b, n), a.new_empty(b, n, n)


def _small_singular_values_fake(a: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[2])


library.impl("small_svd", _small_svd, ANY_DEVICE)
library.impl("small_singular_values", _small_singular_values, ANY_DEVICE)
torch.library.register_fake(f"{NAMESPACE}::small_svd", _small_svd_fake)
torch.library.register_fake(f"{NAMESPACE}::small_singular_values", _small_singular_values_fake)


def small_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the thin SVD of a stack of small matrices, a = u diag(s) vᵀ.

    The extension uses one-sided Jacobi, the torch twin LAPACK or cuSOLVER. Singular values of at
    most n·eps·s_1 are rounding noise: they come back as exactly 0, with a zero column in u; v is
    always orthonormal. A matrix with NaN or Inf gives NaN everywhere. Not differentiable: the
    gradient of an SVD is undefined where singular values meet. For m much larger than n, take a QR
    first and give its R.

    a: [..., m, n], n ≤ m, n ≤ 128. Returns u [..., m, n], s [..., n], descending, v [..., n, n].

    Raises:
        TypeError: a dtype other than float32 and float64.
        ShapeMismatch: n larger than m or 128.
    """
    n = _check_matrix("small_svd", "svd", a)
    u, s, v = registered.small_svd(flatten_stack(a))
    lead = a.shape[:-2]
    return u.reshape(a.shape), s.reshape(*lead, n), v.reshape(*lead, n, n)


def small_singular_values(a: Tensor) -> Tensor:
    """Computes the singular values of a stack of small matrices, without vectors.

    The values are `small_svd`'s at less than half the work and memory: values of at most n·eps·s_1
    are exactly 0, and a matrix with NaN or Inf gives NaN.

    a: [..., m, n], n ≤ m, n ≤ 128. Returns [..., n], descending.

    Raises:
        TypeError: a dtype other than float32 and float64.
        ShapeMismatch: n larger than m or 128.
    """
    n = _check_matrix("small_singular_values", "svdvals", a)
    found: Tensor = registered.small_singular_values(flatten_stack(a))
    return found.reshape(*a.shape[:-2], n)


def _check_matrix(op: str, of_torch: str, a: Tensor) -> int:
    """Returns the columns of a; refuses more than its rows or 128."""
    check_operands(op, a=a)
    m, n = a.shape[-2:]
    if n > m or n > MAX_SVD_COLUMNS:
        raise ShapeMismatch(
            f"{op}: takes [..., m, n] with n <= m and n <= {MAX_SVD_COLUMNS}, not {m} x {n}; "
            f"use torch.linalg.{of_torch}"
        )
    return n
