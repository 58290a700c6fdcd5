"""project_pair: rows through the subspaces of two bases, range and complement at once."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import native, torch_twin
from .operands import ANY_DEVICE, NAMESPACE, check_operands, flatten_stack, library, registered

library.define("project_pair(Tensor us, Tensor ut, Tensor x) -> (Tensor, Tensor)")


def run_project_pair(
    kernels: ModuleType, us: Tensor, ut: Tensor, x: Tensor, cuda: bool
) -> tuple[Tensor, Tensor]:
    """Runs the kernel: us [b, m, ks], ut [b, m, kt], x [b, r, m].

    `split` and `moved` are [b, 2r, m].
    """
    us, ut, x = us.contiguous(), ut.contiguous(), x.contiguous()
    b, r, m = x.shape
    ks, kt = us.shape[2], ut.shape[2]
    with native.on_device(x):
        size = kernels.project_pair_scratch(b, m, ks, kt, r, x.dtype == torch.float64, cuda)
    coefficients = x.new_empty(size)
    cancelled = x.new_empty(b, r, dtype=torch.int64)
    split, moved = x.new_empty(b, 2 * r, m), x.new_empty(b, 2 * r, m)
    tensors = (us, ut, x, coefficients, cancelled, split, moved)
    native.run_kernel(kernels, "project_pair", tensors, (b, m, ks, kt, r), cuda)
    return split, moved


def _project_pair(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    # torch multiplies float64 on tensor cores where a GPU has them for it.
    if x.dtype == torch.float64:
        return torch_twin.project_pair(us, ut, x)
    sizes, twin = (*x.shape, us.shape[2], ut.shape[2]), torch_twin.project_pair
    return native.run_best("project_pair", x, sizes, run_project_pair, twin, (us, ut, x), list)


def _project_pair_fake(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    b, r, m = x.shape
    return x.new_empty(b, 2 * r, m), x.new_empty(b, 2 * r, m)


library.impl("project_pair", _project_pair, ANY_DEVICE)
torch.library.register_fake(f"{NAMESPACE}::project_pair", _project_pair_fake)


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
