"""small_svd: thin SVD of a stack of small matrices; small_singular_values: its values alone."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from ..parallel import map_on_threads
from . import native
from .operands import check_operands, flatten_stack, register, registered

MAX_SVD_COLUMNS = 128
"""kMaxSvdColumns in csrc/ops.h."""

# On a CPU LAPACK is faster beyond: speed of the extension over it on one core of an EPYC is 2.6 at
# 8 columns, 1.0 at 16, 0.85 at 24.
CPU_COLUMNS = 16

# Entries of a matrix that the kernels can count: their indices have 32 bits.
MAX_ENTRIES = 2**31 - 1


def run_small_svd(kernels: ModuleType, a: Tensor, cuda: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the kernel on a [b, m, n]: u [b, m, n], s [b, n], v [b, n, n]."""
    a = a.contiguous()
    b, _, n = a.shape
    u, s, v = torch.empty_like(a), a.new_empty(b, n), a.new_empty(b, n, n)
    _run(kernels, "small_svd", cuda, {"a": a, "u": u, "s": s, "v": v})
    return u, s, v


def run_small_singular_values(kernels: ModuleType, a: Tensor, cuda: bool) -> Tensor:
    """Runs the kernel on a [b, m, n] -> s [b, n]."""
    a = a.contiguous()
    s = a.new_empty(a.shape[0], a.shape[2])
    _run(kernels, "small_singular_values", cuda, {"a": a, "s": s})
    return s


def _run(kernels: ModuleType, op: str, cuda: bool, tensors: dict[str, Tensor]) -> None:
    a = tensors["a"]
    (b, m, n), float64 = a.shape, a.dtype == torch.float64
    with native.on_device(a):
        size = kernels.small_svd_scratch(b, m, n, "v" in tensors, float64, cuda)
    scratch = torch.empty(size, dtype=torch.uint8, device=a.device)
    sizes = {"batch": b, "m": m, "n": n}
    native.run_kernel(kernels, op, cuda, float64, tensors | {"scratch": scratch}, sizes)


def svd_on_threads(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs torch.linalg.svd, the stack shared out over the threads of the CPU.

    At these sizes LAPACK has no use for a second thread.

    a: [b, m, n], n ≤ m. Returns u [b, m, n], s [b, n] descending, v [b, n, n].
    """
    parts = map_on_threads(svd_of_stack, share_of_threads(a))
    u, s, v = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return u, s, v


def values_on_threads(a: Tensor) -> Tensor:
    """Runs torch.linalg.svdvals likewise: [b, n], descending."""
    return torch.cat(map_on_threads(values_of_stack, share_of_threads(a)))


def share_of_threads(a: Tensor) -> list[Tensor]:
    """Splits a stack into one part for each CPU thread; on a GPU into one."""
    workers = torch.get_num_threads() if a.device.type == "cpu" else 1
    return list(a.tensor_split(max(1, min(len(a), workers))))


def svd_of_stack(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decomposes on one thread: noise among s is 0, NaN and Inf give NaN."""
    n = a.shape[2]
    finite = a.isfinite().all(2).all(1)[:, None, None]  # [b, 1, 1]
    u, s, vt = torch.linalg.svd(torch.where(finite, a, 0), full_matrices=False)
    noise = s <= n * torch.finfo(a.dtype).eps * s.amax(1, keepdim=True) if n else s > 0
    u = u.masked_fill(noise[:, None], 0).masked_fill(~finite, torch.nan)
    s = s.masked_fill(noise, 0).masked_fill(~finite[:, 0], torch.nan)
    return u, s, vt.mT.masked_fill(~finite, torch.nan).contiguous()


def values_of_stack(a: Tensor) -> Tensor:
    """Returns the singular values on one thread: noise is 0, NaN and Inf give NaN."""
    n = a.shape[2]
    finite = a.isfinite().all(2).all(1)[:, None]  # [b, 1]
    s = torch.linalg.svdvals(torch.where(finite[:, None], a, 0))
    noise = s <= n * torch.finfo(a.dtype).eps * s.amax(1, keepdim=True) if n else s > 0
    values: Tensor = s.masked_fill(noise, 0).masked_fill(~finite, torch.nan)
    return values


def _is_torchs(a: Tensor) -> bool:
    """Returns whether LAPACK is faster for a [b, m, n], or it is too large."""
    slower = a.device.type == "cpu" and a.shape[2] > CPU_COLUMNS
    return slower or a.shape[1] * a.shape[2] > MAX_ENTRIES


def _compare(result: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    u, s, v = result
    return [(u * s[:, None]) @ v.mT, s]


native.OPS["small_svd"] = native.Op(run_small_svd, svd_on_threads, _compare)
native.OPS["small_singular_values"] = native.Op(
    run_small_singular_values,
    values_on_threads,
    lambda s: [s],
    on_cpu="LAPACK is faster on a CPU",
)
register(
    "small_svd(Tensor a) -> (Tensor, Tensor, Tensor)",
    lambda a: svd_on_threads(a) if _is_torchs(a) else native.run_best("small_svd", a, a.shape, a),
    lambda a: (
        torch.empty_like(a),
        a.new_empty(a.shape[::2]),
        a.new_empty(len(a), *a.shape[2:] * 2),
    ),
)
register(
    "small_singular_values(Tensor a) -> Tensor",
    lambda a: (
        values_on_threads(a)
        if _is_torchs(a)
        else native.run_best("small_singular_values", a, a.shape, a)
    ),
    lambda a: a.new_empty(a.shape[::2]),
)


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
    values: Tensor = registered.small_singular_values(flatten_stack(a))
    return values.reshape(*a.shape[:-2], n)


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
