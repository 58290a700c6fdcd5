"""subspace_overlap: ‖UsᵀUt‖_F², for groups of different shapes in one call.

A group is a stack of one shape. The kernels find the groups through a table of addresses and sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import native
from .operands import check_operands, flatten_stack, register, registered

BLOCK = 64
"""Rows and columns of a block of UsᵀUt: kOverlapBlock in csrc/ops.h."""

# Entries of products that the twin forms at a time.
PRODUCT = 2 << 20


def run_subspace_overlap(
    kernels: ModuleType, us: Sequence[Tensor], ut: Sequence[Tensor], cuda: bool
) -> Tensor:
    """Runs the kernel for all groups: us[g] [b, m, ks], ut[g] [b, m, kt] -> float64 [Σ b]."""
    us, ut = [x.contiguous() for x in us], [x.contiguous() for x in ut]
    pairs = list(zip(us, ut, strict=True))
    shapes = [(len(s), -(-s.shape[2] // BLOCK) * -(-t.shape[2] // BLOCK)) for s, t in pairs]
    first = [0, *accumulate(b * blocks for b, blocks in shapes)]
    rows = [
        (s.data_ptr(), t.data_ptr(), *s.shape, t.shape[2], begin)
        for (s, t), begin in zip(pairs, first, strict=False)
    ]
    groups = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if us[0].is_cuda:  # from pinned memory, so that the host does not wait for the stream
        groups = groups.pin_memory().to(us[0].device, non_blocking=True)
    sums = us[0].new_empty(first[-1], dtype=torch.float64)
    tensors, sizes = {"groups": groups, "sums": sums}, {"count": len(rows), "blocks": first[-1]}
    float64 = us[0].dtype == torch.float64
    native.run_kernel(kernels, "subspace_overlap", cuda, float64, tensors, sizes)
    parts = sums.split([b * blocks for b, blocks in shapes])
    shaped = zip(parts, shapes, strict=True)
    return torch.cat([part.view(b, blocks).sum(1) for part, (b, blocks) in shaped])


def sum_overlaps(us: Sequence[Tensor], ut: Sequence[Tensor]) -> Tensor:
    """Computes the same by products of torch."""
    sums = []
    for left, right in zip(us, ut, strict=True):
        at_a_time = max(1, PRODUCT // max(1, left.shape[2] * right.shape[2]))
        for s, t in zip(left.split(at_a_time), right.split(at_a_time), strict=True):
            sums.append((s.mT @ t).square_().sum((1, 2), dtype=torch.float64))
    return torch.cat(sums)


def _run(us: list[Tensor], ut: list[Tensor]) -> Any:
    # On a GPU torch multiplies float64 on tensor cores where there are any for it.
    if us[0].dtype == torch.float64:
        return sum_overlaps(us, ut)
    sizes = (len(us), *us[0].shape, ut[0].shape[2])
    return native.run_best("subspace_overlap", us[0], sizes, us, ut)


native.OPS["subspace_overlap"] = native.Op(
    run_subspace_overlap, sum_overlaps, lambda sums: [sums], on_cpu=native.PRODUCTS
)
register(
    "subspace_overlap(Tensor[] us, Tensor[] ut) -> Tensor",
    _run,
    lambda us, ut: us[0].new_empty(sum(len(x) for x in us), dtype=torch.float64),
)


def subspace_overlap(us: Sequence[Tensor], ut: Sequence[Tensor]) -> list[Tensor]:
    """Computes what pairs of subspaces share: ‖usᵀut‖_F², all groups in one launch.

    us: a group each: [..., m, ks], orthonormal columns; ut: [..., m, kt], for the same groups.
    Returns float64 [...] for each group. Not differentiable.

    Raises:
        TypeError: a dtype other than float32 and float64, or two dtypes or devices.
        ShapeMismatch: shapes that do not agree but for the last dimension.
    """
    if not us and not ut:
        return []
    for s, t in zip(us, ut, strict=True):
        check_operands("subspace_overlap", us=s, ut=t)
        if s.dtype != us[0].dtype or s.device != us[0].device:
            raise TypeError("subspace_overlap: all groups must have one dtype and device")
    left, right = [flatten_stack(x) for x in us], [flatten_stack(x) for x in ut]
    sums: Tensor = registered.subspace_overlap(left, right)
    parts = sums.split([len(x) for x in left])
    return [part.reshape(x.shape[:-2]) for part, x in zip(parts, us, strict=True)]
