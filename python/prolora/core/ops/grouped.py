"""Native ops over groups of matrices of different shapes, as torch operators; see `ops`.

    overlap_table   block sums and shells of (UsᵀUt)², for all layers and both sides in one call

A group is a stack of one shape. The kernels find the groups through a table of addresses and sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import _C
from . import operators

BLOCK: int = _C.overlap_block
"""Rows and columns of a block of an overlap table."""

# Entries of products that are formed at a time where torch forms them.
PRODUCT = 2 << 20

_library = torch.library.Library("prolora", "FRAGMENT")
_library.define("overlap_table(Tensor[] us, Tensor[] ut) -> (Tensor, Tensor)")


def cpu_has_tiles() -> bool:
    """Whether overlap_table runs in matrix tiles (AMX) for float32 on this machine's CPU."""
    return _C.cpu_has_tiles()


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def _sizes(us: Tensor, ut: Tensor) -> tuple[int, int, int]:
    """Blocks, strips and shells of a group [b, m, ks], [b, m, kt]."""
    b, _, ks = us.shape
    kt = ut.shape[2]
    fewest = min(ks, kt)
    return b * _blocks(ks) * _blocks(kt), b * _blocks(fewest), b * fewest


def _starts(sizes: Iterable[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


def run_overlap_table(
    kernels: ModuleType, us: Sequence[Tensor], ut: Sequence[Tensor], cuda: bool
) -> tuple[Tensor, Tensor]:
    """us[g]: [b, m, ks], ut[g]: [b, m, kt] -> table and shells of all groups, float64, flat."""
    us, ut = [x.contiguous() for x in us], [x.contiguous() for x in ut]
    sizes = [_sizes(s, t) for s, t in zip(us, ut, strict=True)]
    blocks, strips, shells = (_starts(column) for column in zip(*sizes, strict=True))
    rows = [
        (s.data_ptr(), t.data_ptr(), *s.shape, t.shape[2], *first)
        for s, t, *first in zip(us, ut, blocks, strips, shells, strict=False)
    ]
    groups = torch.tensor(rows, dtype=torch.int64).to(us[0].device)
    table = us[0].new_empty(blocks[-1], dtype=torch.float64)
    edges = us[0].new_empty(blocks[-1], BLOCK, dtype=torch.float64)
    shell = us[0].new_empty(shells[-1], dtype=torch.float64)
    pointers = [x.data_ptr() for x in (groups, table, edges, shell)]
    with operators._device(us[0]):
        flags = operators._flags(us[0], cuda)
        kernels.overlap_table(*pointers, len(rows), blocks[-1], strips[-1], *flags)
    return table, shell


def _overlap_table(us: list[Tensor], ut: list[Tensor]) -> tuple[Tensor, Tensor]:
    if us[0].is_cuda or (us[0].dtype == torch.float32 and cpu_has_tiles()):
        return run_overlap_table(_C, us, ut, us[0].is_cuda)
    # Without matrix tiles the kernel has 0.5 to 0.8 of the speed of the vendor's products.
    return _multiplied(us, ut)


def _multiplied(us: list[Tensor], ut: list[Tensor]) -> tuple[Tensor, Tensor]:
    """By torch's products, a few matrices at a time."""
    tables, shells = [], []
    for group in zip(us, ut, strict=True):
        size = max(1, PRODUCT // max(1, group[0].shape[2] * group[1].shape[2]))
        for s, t in zip(*(x.split(size) for x in group), strict=True):
            shared = (s.mT @ t).square_()
            rows, columns = _indicator(shared.shape[1], s), _indicator(shared.shape[2], s)
            tables.append((rows.mT @ (shared @ columns)).flatten().double())
            fewest = min(shared.shape[1:])
            corner = shared[:, :fewest, :fewest]
            # Of the entries with max(i, j) = k one half lies in row k, the other in column k.
            below, above = corner.tril().sum(2), corner.triu(1).sum(1)
            shells.append((below.double() + above.double()).flatten())
    return torch.cat(tables), torch.cat(shells)


def _indicator(columns: int, like: Tensor) -> Tensor:
    """[columns, blocks], 1 where a column lies in a block: sums over blocks as a product."""
    places = torch.arange(columns, device=like.device) // BLOCK
    return (places[:, None] == torch.arange(_blocks(columns), device=like.device)).to(like.dtype)


def _overlap_table_fake(us: list[Tensor], ut: list[Tensor]) -> tuple[Tensor, Tensor]:
    sizes = [_sizes(s, t) for s, t in zip(us, ut, strict=True)]
    table, shells = sum(size[0] for size in sizes), sum(size[2] for size in sizes)
    empty = us[0].new_empty
    return empty(table, dtype=torch.float64), empty(shells, dtype=torch.float64)


for _key in ("CPU", "CUDA"):
    _library.impl("overlap_table", _overlap_table, _key)
torch.library.register_fake("prolora::overlap_table", _overlap_table_fake)


def overlap_table(us: Sequence[Tensor], ut: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """How much the leading a columns of us and b of ut share, for all a and b in one pass.

    With C = usᵀut the overlap at (a, b) is the sum of C² over its first a rows and b columns. All
    groups run in one launch. On a CPU with matrix tiles float32 is multiplied as three products of
    bfloat16 halves there: the sums keep six to seven digits.

    Args:
        us: a group each: [b, m, ks] (or [m, ks]), orthonormal columns, sorted by singular value.
        ut: [b, m, kt] (or [m, kt]), for the same groups.

    Returns:
        For each group its table [b, ⌈ks/64⌉, ⌈kt/64⌉], sums of C² over blocks of 64 × 64, and its
        shells [b, min(ks, kt)], sums over max(i, j) = k, so that cumulative sums give the overlap
        at a = b = k + 1. float64. Not differentiable; `ops.overlap` is.

    Raises:
        TypeError: a dtype other than float32 and float64, or two dtypes or devices.
        ShapeMismatch: shapes that do not agree but for the last dimension.
    """
    if not us and not ut:
        return []
    for s, t in zip(us, ut, strict=True):
        operators._check("overlap_table", us=s, ut=t)
        if s.dtype != us[0].dtype or s.device != us[0].device:
            raise TypeError("overlap_table: all groups must have one dtype and device")
    left, right = [operators._stack(x) for x in us], [operators._stack(x) for x in ut]
    table, shells = torch.ops.prolora.overlap_table(left, right)
    sizes = [_sizes(s, t) for s, t in zip(left, right, strict=True)]
    found = []
    for given, s, t, part, shell in zip(
        us,
        left,
        right,
        table.split([size[0] for size in sizes]),
        shells.split([size[2] for size in sizes]),
        strict=True,
    ):
        lead = given.shape[:-2]
        ks, kt = s.shape[2], t.shape[2]
        found.append(
            (
                part.reshape(*lead, _blocks(ks), _blocks(kt)),
                shell.reshape(*lead, min(ks, kt)),
            )
        )
    return found
