"""Overlap Φ of nested subspaces at every number of columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import Basis
from .ops.overlap_table import overlap_table
from .ops.torch_twin import BLOCK
from .precision import in_full_precision, working_dtype


@dataclass(frozen=True)
class OverlapTable:
    """What the leading columns of U_s and U_t share, for all numbers.

    U_s is [..., m, ks], U_t [..., m, kt]. Sweeps over the rank or over the threshold read sums that
    exist already.
    """

    blocks: Tensor  # [..., ⌈ks/64⌉, ⌈kt/64⌉], float64: Σ(U_sᵀU_t)² over blocks of 64 × 64
    # [..., min(ks, kt)], float64: the same sum over entries (i, j) with max(i, j) = k
    shells: Tensor
    columns: tuple[int, int]  # ks and kt

    def shared(self, source: int, target: int | None = None) -> Tensor:
        """Returns ‖U_sᵀU_t‖_F² [...] of the leading `source` and `target` columns.

        source: leading columns of U_s; target: of U_t; None means as many.

        Raises:
            ValueError: more columns than there are, or numbers that the table does not hold: it has
                equal ones, and multiples of 64 up to all columns.
        """
        target = source if target is None else target
        ks, kt = self.columns
        if not (0 <= source <= ks and 0 <= target <= kt):
            raise ValueError(f"the bases have {ks} and {kt} columns, not {source} and {target}")
        if source == target:
            return self.shells[..., :source].sum(-1)
        if any(k % BLOCK and k != all_ for k, all_ in ((source, ks), (target, kt))):
            raise ValueError(
                f"the table knows unequal numbers of columns in steps of {BLOCK} and at {ks} and "
                f"{kt}, not {source} and {target}"
            )
        rows, cols = -(-source // BLOCK), -(-target // BLOCK)
        return self.blocks[..., :rows, :cols].sum((-2, -1))

    def pair(self, i: int, source: int, target: int) -> OverlapTable:
        """Returns the table of pair i of a stack, without its columns of zeros."""
        rows, cols = -(-source // BLOCK), -(-target // BLOCK)
        blocks, shells = self.blocks[i, :rows, :cols], self.shells[i, : min(source, target)]
        return OverlapTable(blocks, shells, (source, target))

    def cpu(self) -> OverlapTable:
        """Copies the table to the CPU."""
        return OverlapTable(self.blocks.cpu(), self.shells.cpu(), self.columns)

    def at(self, source: int, target: int | None = None) -> Tensor:
        """Returns Φ [...] of the leading columns: `shared` over the smaller number."""
        return self.shared(source, target) / max(
            1, min(source, source if target is None else target)
        )

    def curve(self) -> Tensor:
        """Returns Φ [..., min(ks, kt)] of the leading k columns, for all k."""
        counts = torch.arange(1, self.shells.shape[-1] + 1, device=self.shells.device)
        return self.shells.cumsum(-1) / counts


@in_full_precision
def overlap_tables(source: Sequence[Tensor], target: Sequence[Tensor]) -> list[OverlapTable]:
    """Returns the tables of many pairs of bases, of any shapes, in one call.

    source: U_s [..., m, ks] of each group, columns by descending singular value; target: U_t [...,
    m, kt].

    Raises:
        TypeError: a dtype other than float32 and float64, or two dtypes or devices.
        ShapeMismatch: a pair that does not live in one space.
    """
    tables = overlap_table(source, target)
    return [
        OverlapTable(blocks, shells, (s.shape[-1], t.shape[-1]))
        for (blocks, shells), s, t in zip(tables, source, target, strict=True)
    ]


def basis_tables(source: Basis, target: Basis) -> tuple[OverlapTable, OverlapTable]:
    """Returns the tables of two bases of one shape, left and right."""
    work = working_dtype(source.U.dtype, target.U.dtype)
    sides = [[basis.U.to(work), basis.V.to(work)] for basis in (source, target)]
    left, right = overlap_tables(*sides)
    return left, right
