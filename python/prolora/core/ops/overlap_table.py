"""overlap_table: block sums and shells of (UsᵀUt)², for groups of different shapes in one call.

A group is a stack of one shape. The kernels find the groups through a table of addresses and sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from . import native, torch_twin
from .operands import ANY_DEVICE, NAMESPACE, check_operands, flatten_stack, library, registered
from .torch_twin import BLOCK

library.define("overlap_table(Tensor[] us, Tensor[] ut) -> (Tensor, Tensor)")


def count_blocks(columns: int) -> int:
    """Blocks of 64 that cover so many columns."""
    return -(-columns // BLOCK)


def group_sizes(us: Tensor, ut: Tensor) -> tuple[int, int, int]:
    """Blocks, strips and shells of a group [b, m, ks], [b, m, kt]."""
    b, _, ks = us.shape
    kt = ut.shape[2]
    fewest = min(ks, kt)
    return b * count_blocks(ks) * count_blocks(kt), b * count_blocks(fewest), b * fewest


def run_overlap_table(
    kernels: ModuleType, us: Sequence[Tensor], ut: Sequence[Tensor], cuda: bool
) -> tuple[Tensor, Tensor]:
    """Runs the kernel for all groups: us[g] [b, m, ks], ut[g] [b, m, kt].

    Table and shells come back flat, in float64.
    """
    us, ut = [x.contiguous() for x in us], [x.contiguous() for x in ut]
    sizes = [group_sizes(s, t) for s, t in zip(us, ut, strict=True)]
    blocks, strips, shells = ([0, *accumulate(column)] for column in zip(*sizes, strict=True))
    rows = [
        (s.data_ptr(), t.data_ptr(), *s.shape, t.shape[2], *first)
        for s, t, *first in zip(us, ut, blocks, strips, shells, strict=False)
    ]
    groups = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if us[0].is_cuda:  # from pinned memory, so that the host does not wait for the stream
        groups = groups.pin_memory().to(us[0].device, non_blocking=True)
    table = us[0].new_empty(blocks[-1], dtype=torch.float64)
    edges = us[0].new_empty(blocks[-1], BLOCK, dtype=torch.float64)
    shell = us[0].new_empty(shells[-1], dtype=torch.float64)
    tensors, counts = (groups, table, edges, shell), (len(rows), blocks[-1], strips[-1])
    float64 = us[0].dtype == torch.float64
    native.run_kernel(kernels, "overlap_table", tensors, counts, cuda, float64)
    return table, shell


def _overlap_table(us: list[Tensor], ut: list[Tensor]) -> tuple[Tensor, Tensor]:
    sizes, twin = (len(us), *us[0].shape, ut[0].shape[2]), torch_twin.overlap_table
    return native.run_best("overlap_table", us[0], sizes, run_overlap_table, twin, (us, ut), list)


def _overlap_table_fake(us: list[Tensor], ut: list[Tensor]) -> tuple[Tensor, Tensor]:
    sizes = [group_sizes(s, t) for s, t in zip(us, ut, strict=True)]
    table, shells = sum(size[0] for size in sizes), sum(size[2] for size in sizes)
    empty = us[0].new_empty
    return empty(table, dtype=torch.float64), empty(shells, dtype=torch.float64)


library.impl("overlap_table", _overlap_table, ANY_DEVICE)
torch.library.register_fake(f"{NAMESPACE}::overlap_table", _overlap_table_fake)


def overlap_table(us: Sequence[Tensor], ut: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Sums how much the leading a columns of us and b of ut share.

    With C = usᵀut the overlap at (a, b) is the sum of C² over its first a rows and b columns; one
    pass gives it for all a and b. All groups run in one launch.

    us: a group each: [b, m, ks] (or [m, ks]), orthonormal columns, sorted by singular value; ut:
    [b, m, kt] (or [m, kt]), for the same groups. Returns for each group its table
    [b, ⌈ks/64⌉, ⌈kt/64⌉], sums of C² over blocks of 64 × 64, and its shells [b, min(ks, kt)], sums
    over max(i, j) = k, so that cumulative sums give the overlap at a = b = k + 1. float64. Not
    differentiable.

    Raises:
        TypeError: a dtype other than float32 and float64, or two dtypes or devices.
        ShapeMismatch: shapes that do not agree but for the last dimension.
    """
    if not us and not ut:
        return []
    for s, t in zip(us, ut, strict=True):
        check_operands("overlap_table", us=s, ut=t)
        if s.dtype != us[0].dtype or s.device != us[0].device:
            raise TypeError("overlap_table: all groups must have one dtype and device")
    left, right = [flatten_stack(x) for x in us], [flatten_stack(x) for x in ut]
    table, shells = registered.overlap_table(left, right)
    sizes = [group_sizes(s, t) for s, t in zip(left, right, strict=True)]
    tables = []
    for given, other, part, shell in zip(
        us,
        ut,
        table.split([size[0] for size in sizes]),
        shells.split([size[2] for size in sizes]),
        strict=True,
    ):
        lead, ks, kt = given.shape[:-2], given.shape[-1], other.shape[-1]
        blocks = part.reshape(*lead, count_blocks(ks), count_blocks(kt))
        tables.append((blocks, shell.reshape(*lead, min(ks, kt))))
    return tables
