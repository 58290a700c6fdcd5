"""project_pair: rows through the subspaces of two bases, range and complement at once."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import native
from .operands import check_operands, flatten_stack, register, registered

# A complement is projected a second time if a row of it holds less than this share of the squared
# norm it had: what is left may then be mostly rounding.
CANCELLED = 1e-2


def run_project_pair(
    kernels: ModuleType, us: Tensor, ut: Tensor, x: Tensor, cuda: bool
) -> tuple[Tensor, Tensor]:
    """Runs the kernel: us [b, m, ks], ut [b, m, kt], x [b, r, m] -> twice [b, 2r, m]."""
    us, ut, x = us.contiguous(), ut.contiguous(), x.contiguous()
    b, r, m = x.shape
    ks, kt = us.shape[2], ut.shape[2]
    with native.on_device(x):
        size = kernels.project_pair_scratch(b, m, ks, kt, r, cuda)
    split, moved = x.new_empty(b, 2 * r, m), x.new_empty(b, 2 * r, m)
    tensors = {
        "us": us,
        "ut": ut,
        "x": x,
        "coefficients": x.new_empty(size),
        "cancelled": x.new_empty(b, r, dtype=torch.int64),
        "split": split,
        "moved": moved,
    }
    sizes = {"batch": b, "m": m, "ks": ks, "kt": kt, "r": r}
    native.run_kernel(kernels, "project_pair", cuda, x.dtype == torch.float64, tensors, sizes)
    return split, moved


def project_twice(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Projects rows: inside and outside us, and these inside and outside ut.

    us: [b, m, ks], orthonormal columns; ut: [b, m, kt]; x: [b, r, m]. Returns split and moved, each
    [b, 2r, m].
    """
    r = x.shape[1]
    inside = x @ us @ us.mT
    split = torch.cat([inside, x - inside], 1)
    again = cancelled_matrices(split[:, r:], x)
    if len(again):
        more = split[again, r:] @ us[again] @ us[again].mT
        split[again] += torch.cat([more, -more], 1)
    moved = split @ ut @ ut.mT
    torch.sub(split[:, r:], moved[:, r:], out=moved[:, r:])
    again = cancelled_matrices(moved[:, r:], split[:, r:])
    if len(again):
        moved[again, r:] -= moved[again, r:] @ ut[again] @ ut[again].mT
    return split, moved


def cancelled_matrices(rest: Tensor, rows: Tensor) -> Tensor:
    """Finds the matrices [b, r, m] with a row that lost nearly all its length."""
    left = torch.linalg.vector_norm(rest, dim=2).square()  # [b, r]
    had = torch.linalg.vector_norm(rows, dim=2).square()
    indices: Tensor = (left < CANCELLED * had).any(1).nonzero().flatten()
    return indices


def _run(us: Tensor, ut: Tensor, x: Tensor) -> Any:
    # torch multiplies float64 on tensor cores where a GPU has them for it.
    if x.dtype == torch.float64:
        return project_twice(us, ut, x)
    sizes = (*x.shape, us.shape[2], ut.shape[2])
    return native.run_best("project_pair", x, sizes, us, ut, x)


native.OPS["project_pair"] = native.Op(run_project_pair, project_twice, on_cpu=native.PRODUCTS)
register(
    "project_pair(Tensor us, Tensor ut, Tensor x) -> (Tensor, Tensor)",
    _run,
    lambda us, ut, x: tuple(x.new_empty(len(x), 2 * x.shape[1], x.shape[2]) for _ in range(2)),
)


def project_pair(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Projects rows x through two subspaces: range to range, complement to complement.

    Complements are projected twice: the second time removes what cancellation left in them.

    us: [..., m, ks], orthonormal columns; zero columns are padding and change nothing; ut:
    [..., m, kt], as us; x: [..., r, m]. Returns split [..., 2r, m]: x usᵀ-inside above x outside,
    which add up to x; and moved [..., 2r, m]: the first inside ut above the second outside ut.
    Not differentiable: `methods` differentiates it.

    Raises:
        TypeError: a dtype other than float32 and float64, or two dtypes or devices.
        ShapeMismatch: shapes that do not agree.
    """
    check_operands("project_pair", us=us, ut=ut, x=x.mT)
    split, moved = registered.project_pair(*(flatten_stack(t) for t in (us, ut, x)))
    shape = (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1])
    return split.reshape(shape), moved.reshape(shape)
