"""Every op in torch: what runs where the extension does not, and what it computes, to read.

Arguments are checked and flattened by the callers: stacks [b, ...] of float32 or float64 on one
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..parallel import map_on_threads

BLOCK = 64
"""Rows and columns of a block of an overlap table: kOverlapBlock in csrc/ops.h."""

# Entries of products that overlap_table forms at a time.
PRODUCT = 2 << 20

# project_pair projects a complement a second time if a row of it holds less than this share of the
# squared norm it had: what is left may then be mostly rounding.
CANCELLED = 1e-2

# panel_qr drops a row of which the rows above it leave this share of its length or less.
DROPPED = {torch.float32: 8 * 2.0**-23, torch.float64: 8 * 2.0**-26}


def overlap_table(us: Sequence[Tensor], ut: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of C², C = UsᵀUt, over blocks of 64 × 64 and over the entries with max(i, j) = k.

    Args:
        us: a group each [b, m, ks].
        ut: [b, m, kt].

    Returns:
        The blocks of all groups, then the shells of all groups; flat, float64.
    """
    tables, shells = [], []
    for left, right in zip(us, ut, strict=True):
        at_a_time = max(1, PRODUCT // max(1, left.shape[2] * right.shape[2]))
        for s, t in zip(left.split(at_a_time), right.split(at_a_time), strict=True):
            shared = (s.mT @ t).square_()  # [b, ks, kt]
            rows, columns = block_indicator(s), block_indicator(t)
            tables.append((rows.mT @ (shared @ columns)).flatten().double())
            fewest = min(shared.shape[1:])
            corner = shared[:, :fewest, :fewest]
            # Of the entries with max(i, j) = k one half lies in row k, the other in column k.
            below, above = corner.tril().sum(2), corner.triu(1).sum(1)  # [b, fewest]
            shells.append((below.double() + above.double()).flatten())
    return torch.cat(tables), torch.cat(shells)


def block_indicator(u: Tensor) -> Tensor:
    """u: [b, m, k] -> [k, ⌈k/64⌉], 1 where a column lies in a block: sums as a product."""
    columns = u.shape[2]
    block_of = torch.arange(columns, device=u.device) // BLOCK
    blocks = torch.arange(-(-columns // BLOCK), device=u.device)
    return (block_of[:, None] == blocks).to(u.dtype)


def project_pair(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows inside us above outside us, and these inside ut above outside ut.

    Args:
        us: [b, m, ks], orthonormal columns.
        ut: [b, m, kt].
        x: [b, r, m].

    Returns:
        split and moved, each [b, 2r, m].
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
    """The indices of the matrices [b, r, m] of which a row lost nearly all of its length."""
    left = torch.linalg.vector_norm(rest, dim=2).square()  # [b, r]
    had = torch.linalg.vector_norm(rows, dim=2).square()
    indices: Tensor = (left < CANCELLED * had).any(1).nonzero().flatten()
    return indices


def panel_qr(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal rows by Householder reflections; panels with rows to drop row by row.

    Args:
        panel: [b, r, m], r ≤ m.

    Returns:
        q [b, r, m], l [b, r, r], rank int64 [b], -1 for a panel with NaN or Inf.
    """
    q, lower = split_by_reflections(panel)
    exact = lower.double()  # squares of what float32 holds may be beyond its range
    lengths = torch.linalg.vector_norm(exact, dim=2)  # [b, r], those of the panel's rows
    finite = lengths.isfinite().all(1)  # [b]
    pivots = exact.diagonal(dim1=1, dim2=2).abs()
    dependent = (pivots <= DROPPED[panel.dtype] * lengths).any(1) & finite
    if dependent.any():
        q[dependent], lower[dependent] = split_row_by_row(panel[dependent])
    kept = lower.diagonal(dim1=1, dim2=2) != 0
    return q, lower, kept.sum(1).masked_fill(~finite, -1)


def split_by_reflections(panel: Tensor) -> tuple[Tensor, Tensor]:
    """panel: [b, r, m] -> q [b, r, m], l [b, r, r] by LAPACK, the stack shared out over threads."""
    workers = torch.get_num_threads() if panel.device.type == "cpu" else 1
    if min(workers, len(panel)) > 1:
        parts = map_on_threads(torch.linalg.qr, list(panel.mT.tensor_split(workers)))
        q, upper = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    else:
        q, upper = torch.linalg.qr(panel.mT)
    return q.mT.contiguous(), upper.mT.contiguous()


def split_row_by_row(panel: Tensor) -> tuple[Tensor, Tensor]:
    """panel: [b, r, m] -> q, l by Gram–Schmidt, twice; a row that others span is zero in q."""
    b, r, m = panel.shape
    rows = panel.double()
    scale = torch.linalg.vector_norm(rows, dim=2)  # [b, r]
    q, lower = rows.new_zeros(b, r, m), rows.new_zeros(b, r, r)
    for i in range(r):
        row = rows[:, i] / torch.where(scale[:, i] > 0, scale[:, i], 1)[:, None]  # [b, m]
        for _ in range(2):
            along = (q[:, :i] @ row[:, :, None])[:, :, 0]  # [b, i]
            row = row - (along[:, None] @ q[:, :i])[:, 0]
            lower[:, i, :i] += along * scale[:, i, None]
        sine = torch.linalg.vector_norm(row, dim=1)
        kept = sine > DROPPED[panel.dtype]
        q[:, i] = torch.where(kept[:, None], row / torch.where(kept, sine, 1)[:, None], 0)
        lower[:, i, i] = torch.where(kept, sine * scale[:, i], 0)
    return q.to(panel.dtype), lower.to(panel.dtype)


def small_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch.linalg.svd, the stack shared out over the threads of the CPU.

    torch takes one matrix after the other, and at these sizes LAPACK has no use for a second
    thread.

    Args:
        a: [b, m, n], n ≤ m.

    Returns:
        u [b, m, n], s [b, n] descending, v [b, n, n].
    """
    parts = map_on_threads(svd_of_stack, share_of_threads(a))
    u, s, v = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return u, s, v


def small_singular_values(a: Tensor) -> Tensor:
    """torch.linalg.svdvals, the stack shared out over the threads of the CPU.

    Args:
        a: [b, m, n], n ≤ m.

    Returns:
        [b, n], descending.
    """
    return torch.cat(map_on_threads(values_of_stack, share_of_threads(a)))


def share_of_threads(a: Tensor) -> list[Tensor]:
    """A stack in as many parts as the CPU has threads for; on a GPU in one."""
    workers = torch.get_num_threads() if a.device.type == "cpu" else 1
    return list(a.tensor_split(max(1, min(len(a), workers))))


def svd_of_stack(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same on one thread: noise among s is 0, NaN and Inf give NaN."""
    n = a.shape[2]
    finite = a.isfinite().all(2).all(1)[:, None, None]  # [b, 1, 1]
    u, s, vt = torch.linalg.svd(torch.where(finite, a, 0), full_matrices=False)
    noise = s <= n * torch.finfo(a.dtype).eps * s.amax(1, keepdim=True) if n else s > 0
    u = u.masked_fill(noise[:, None], 0).masked_fill(~finite, torch.nan)
    s = s.masked_fill(noise, 0).masked_fill(~finite[:, 0], torch.nan)
    return u, s, vt.mT.masked_fill(~finite, torch.nan).contiguous()


def values_of_stack(a: Tensor) -> Tensor:
    """The singular values on one thread: noise is 0, NaN and Inf give NaN."""
    n = a.shape[2]
    finite = a.isfinite().all(2).all(1)[:, None]  # [b, 1]
    s = torch.linalg.svdvals(torch.where(finite[:, None], a, 0))
    noise = s <= n * torch.finfo(a.dtype).eps * s.amax(1, keepdim=True) if n else s > 0
    values: Tensor = s.masked_fill(noise, 0).masked_fill(~finite, torch.nan)
    return values
