"""small_svd: thin SVD of a stack of small matrices."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..errors import ShapeMismatch
from . import native, torch_twin
from .operands import ANY_DEVICE, check_operands, flatten_stack, library

MAX_SVD_COLUMNS = 128
"""kMaxSvdColumns in csrc/ops.h."""

# On a CPU LAPACK is faster beyond: speed of the extension over it on one core of an EPYC is 2.6 at
# 8 columns, 1.0 at 16, 0.85 at 24.
CPU_COLUMNS = 16

library.define("small_svd(Tensor a) -> (Tensor, Tensor, Tensor)")


def run_small_svd(kernels: ModuleType, a: Tensor, cuda: bool) -> tuple[Tensor, Tensor, Tensor]:
    """a: [b, m, n] -> u: [b, m, n], s: [b, n], v: [b, n, n]."""
    a = a.contiguous()
    b, m, n = a.shape
    u, s, v = torch.empty_like(a), a.new_empty(b, n), a.new_empty(b, n, n)
    with native.on_device(a):
        size = kernels.small_svd_scratch(b, m, n, a.dtype == torch.float64, cuda)
    scratch = torch.empty(size, dtype=torch.uint8, device=a.device)
    native.run_kernel(kernels, "small_svd", (a, u, s, v, scratch), (b, m, n), cuda)
    return u, s, v


def _small_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kernels = native.kernels_for("small_svd", a.device)
    if kernels is None or (a.device.type == "cpu" and a.shape[2] > CPU_COLUMNS):
        return torch_twin.small_svd(a)
    return run_small_svd(kernels, a, a.is_cuda)


def _small_svd_fake(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, m, n = a.shape
    return a.new_empty(b, m, n), a.new_empty(b, n), a.new_empty(b, n, n)


library.impl("small_svd", _small_svd, ANY_DEVICE)
torch.library.register_fake("prolora::small_svd", _small_svd_fake)


def small_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of a stack of small matrices, a = u diag(s) vᵀ.

    The extension takes one-sided Jacobi, the torch twin LAPACK or cuSOLVER. Singular values of at
    most n·eps·s_1 are rounding noise: they come back as exactly 0, with a zero column in u; v is
    orthonormal always. A matrix with NaN or Inf gives NaN everywhere. Not differentiable: the
    gradient of an SVD is undefined where singular values meet. For m much larger than n, take a QR
    first and give its R.

    Args:
        a: [..., m, n], n ≤ m, n ≤ 128.

    Returns:
        u [..., m, n], s [..., n] in descending order, v [..., n, n].

    Raises:
        TypeError: a dtype other than float32 and float64.
        ShapeMismatch: n larger than m or 128.
    """
    check_operands("small_svd", a=a)
    m, n = a.shape[-2:]
    if n > m or n > MAX_SVD_COLUMNS:
        raise ShapeMismatch(
            f"small_svd: takes [..., m, n] with n <= m and n <= {MAX_SVD_COLUMNS}, not {m} x {n}; "
            "use torch.linalg.svd"
        )
    u, s, v = torch.ops.prolora.small_svd(flatten_stack(a))
    lead = a.shape[:-2]
    return u.reshape(a.shape), s.reshape(*lead, n), v.reshape(*lead, n, n)
