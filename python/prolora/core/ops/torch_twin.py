"""Every op in torch: what runs where the extension does not, and what it computes, to read.

Arguments are checked and flattened by the callers: stacks [b, ...] of float32 or float64 on one
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..parallel import map_on_threads
from ..symmetric import lower_gram, mirror_lower

BLOCK = 64
"""Rows and columns of a block of an overlap table: kOverlapBlock in csrc/ops.h."""

# Entries of products that overlap_table forms at a time.
PRODUCT = 2 << 20

# project_pair projects a complement a second time if a row of it holds less than this share of the
# squared norm it had: what is left may then be mostly rounding.
CANCELLED = 1e-2

# panel_qr drops a row that the rows above it reduce to this share of its length or less, or this
# share of the scale that is given.
DEPENDENT = 1e-6
TINY, HUGE = 1e-290, 1e200  # squared lengths below and above all rows'
DROPPED = 8 * 2.0**-23
# By this share the diagonal is raised to find such rows: above the rounding of float64.
SHIFT = 1e-14
EXPONENT_BITS = 0x7F800000  # of float32


def krylov_block(w: Tensor, rows: Tensor, projected: Tensor, size: int, width: int) -> Tensor:
    """Computes the next block of a basis, and the last image's length outside it.

    w: [b, d, n], any dtype; rows: [b, room, d], the first `size` in use; the next `width` are
    written; projected: [b, room, room]; its rows `size` − `width` to `size` are written; size: of
    the basis; width: of a block. Returns float64 [b].
    """
    known, last = rows[:, :size], slice(size - width, size)
    single = w.to(rows.dtype)
    image, column = subtract_basis(known[:, last] @ single @ single.mT, known)
    projected[:, last, :size] = column
    if size + width <= rows.shape[1]:
        scale = torch.linalg.vector_norm(column, dim=(-2, -1), dtype=torch.float64)
        rows[:, size : size + width] = panel_qr(image, scale)[0].nan_to_num(0.0)
    # As the kernels do: in float32 the squares of what is large or small leave its range.
    length: Tensor = torch.linalg.vector_norm(image, dim=(-2, -1), dtype=torch.float64)
    return length


def subtract_basis(image: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Removes from rows [b, c, d] what a basis [b, size, d] holds of them.

    Classical Gram-Schmidt, twice. Also returns what was removed, [b, c, size].
    """
    first = image @ known.mT
    image = torch.baddbmm(image, first, known, alpha=-1)
    second = image @ known.mT
    return torch.baddbmm(image, second, known, alpha=-1), first + second


def overlap_table(us: Sequence[Tensor], ut: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums C², C = UsᵀUt, over blocks of 64 × 64 and over shells.

    A shell is the entries with max(i, j) = k.

    us: a group each [b, m, ks]; ut: [b, m, kt]. Returns the blocks of all groups, then the shells
    of all groups; flat, float64.
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
    """Maps u [b, m, k] to [k, ⌈k/64⌉]: 1 where a column lies in a block.

    Block sums become a product.
    """
    columns = u.shape[2]
    block_of = torch.arange(columns, device=u.device) // BLOCK
    blocks = torch.arange(-(-columns // BLOCK), device=u.device)
    return (block_of[:, None] == blocks).to(u.dtype)


def project_pair(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
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


def panel_qr(panel: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Makes rows orthonormal by Cholesky QR, twice; nothing waits for the device.

    The first Gram matrix is in float64, which carries a condition of 1e6. The substitution keeps
    panel = l q to the rounding of each row whatever the condition; the second pass, in float32,
    makes q orthonormal to rounding.

    panel: [b, r, m], float32, r ≤ m; scale: float64 [b]; a row that shrinks to DEPENDENT · scale or
    less is dropped as well. Returns q [b, r, m], l [b, r, r], rank int64 [b]. NaN and rank -1: NaN,
    Inf, a length beyond the range of float32, or rows that two passes do not make orthonormal.
    """
    b, r, _ = panel.shape
    if panel.numel() == 0:
        rank = torch.zeros(b, dtype=torch.int64, device=panel.device)
        return torch.zeros_like(panel), panel.new_zeros(b, r, r), rank
    gram, unit = row_products(panel)  # of the rows times unit [b, r, 1], a power of two
    smallest: Tensor | float = TINY
    if scale is not None:
        smallest = (unit[:, :, 0] * (DEPENDENT * scale[:, None])).square_().clamp_min_(TINY)
    dropped, limit = find_dependent(gram, smallest)  # [b, r]
    squares = gram.diagonal(dim1=1, dim2=2) + dropped
    # Behind a diagonal this large a row no longer counts; earlier rows still explain it.
    gram.diagonal(dim1=1, dim2=2).masked_fill_(dropped, HUGE)
    factor = torch.linalg.cholesky_ex(gram)[0]
    factor.diagonal(dim1=1, dim2=2).masked_fill_(dropped, 1)
    left = squares - factor.square().sum(2)  # of dropped rows, 0 of others
    factor = factor.to(panel.dtype)
    q = substitute_rows(factor, panel, unit, dropped)
    again = (q @ q.mT).double()
    again.diagonal(dim1=1, dim2=2).add_(dropped)
    second, failed = torch.linalg.cholesky_ex(again)
    # NaN and Inf end here, and so does whatever else the first factor came from: any factor at all
    # leaves panel = factor q, and one pass more makes such rows orthonormal.
    good = (second.diagonal(dim1=1, dim2=2) >= 0.5) & (unit[:, :, 0] > 0) & (left <= 4 * limit)
    bad = (good.all(1) & (failed == 0)).logical_not_()
    second.masked_fill_(bad[:, None, None], torch.nan)
    eye = torch.eye(r, dtype=second.dtype, device=second.device)
    inverse = torch.linalg.solve_triangular(second, eye, upper=False).to(panel.dtype)
    lower = (factor @ second.to(panel.dtype)).div_(unit)
    lower.masked_fill_((dropped & ~bad[:, None])[:, None], 0)
    return inverse @ q, lower, (~dropped).sum(1).masked_fill_(bad, -1)


def row_products(panel: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplies the rows with each other, each scaled by a power of two.

    The products are float64 [b, r, r], the powers [b, r, 1]. A power is 0 for a row whose length
    float32 cannot hold.
    """
    wide = panel.double()  # where the squares of float32 are far from the ends of the range
    gram = wide @ wide.mT
    unit = near_reciprocal(gram.diagonal(dim1=1, dim2=2).sqrt().float()[:, :, None])
    return gram.mul_(unit).mul_(unit.mT), unit


def near_reciprocal(size: Tensor) -> Tensor:
    """Returns the power of two that brings a size to [1, 2).

    Subnormal numbers stay below.
    """
    power = size.clamp_min(torch.finfo(torch.float32).tiny).view(torch.int32)
    return power.bitwise_and(EXPONENT_BITS).view(torch.float32).reciprocal_()


def find_dependent(gram: Tensor, smallest: Tensor | float) -> tuple[Tensor, Tensor]:
    """Finds rows that the rows before them explain, bool [b, r].

    Also returns what may be left of a row, squared. A factorisation that drops rows one after the
    other waits for each. Here all pivots come from one Cholesky factorisation with a little more on
    the diagonal, so that it gets to the end. A row to be dropped counts for the rows behind it,
    which matters only to a row along what is left of it; `panel_qr` looks for such rows afterwards.

    gram: products of the rows, float64 [b, r, r]; smallest: a row is dropped if the square of what
    is left of it is at most this [b, r], or at most DROPPED² of its own.
    """
    shifted = gram.clone()
    diagonal = shifted.diagonal(dim1=1, dim2=2)
    limit = (diagonal * DROPPED**2).clamp_min_(smallest)
    diagonal.mul_(1 + SHIFT).add_(TINY / 2)  # a row of zeros stays below its limit
    pivots = torch.linalg.cholesky_ex(shifted)[0].diagonal(dim1=1, dim2=2).square()
    return (pivots > limit).logical_not_(), limit


def substitute_rows(factor: Tensor, panel: Tensor, unit: Tensor, dropped: Tensor) -> Tensor:
    """Solves factor⁻¹ (unit · panel) [b, r, m], with zeros for dropped rows.

    factor: lower [b, r, r], with no entry below the diagonal in the column of a dropped row; panel:
    [b, r, m]; unit: [b, r, 1]; dropped: [b, r].
    """
    none = dropped[:, :, None]
    factor = factor.masked_fill(none, 0)
    factor.diagonal(dim1=1, dim2=2).masked_fill_(dropped, 1)
    scaled = panel * unit.masked_fill(none, 0)
    # From the right, where the rows are the columns that LAPACK wants.
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, scaled.mT, upper=True, left=False)
    return solved.mT


def precise_product(x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Multiplies in float64: x [b, r, p], y [b, c, p], any dtype -> x yᵀ, or x xᵀ; zeros [b]."""
    product = mirror_lower(lower_gram(x)) if y is None else x.double() @ y.double().mT
    return product, product.new_zeros(len(x))


def small_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs torch.linalg.svd, the stack shared out over the threads of the CPU.

    torch takes one matrix after the other, and at these sizes LAPACK has no use for a second
    thread.

    a: [b, m, n], n ≤ m. Returns u [b, m, n], s [b, n] descending, v [b, n, n].
    """
    parts = map_on_threads(svd_of_stack, share_of_threads(a))
    u, s, v = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return u, s, v


def small_singular_values(a: Tensor) -> Tensor:
    """Runs torch.linalg.svdvals, the stack shared out over the threads of the CPU.

    a: [b, m, n], n ≤ m. Returns [b, n], descending.
    """
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


def tridiagonalise(symmetric: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduces [b, d, d] by one reflection after the other; what each step does, to read."""
    a = symmetric.triu() + symmetric.triu(1).mT
    b, d, _ = a.shape
    tau = a.new_zeros(b, d)
    for j in range(d - 1):
        x = a[:, j, j + 1 :].clone()
        length = torch.copysign(torch.linalg.vector_norm(x, dim=1), -x[:, 0])
        none = (x[:, 1:] == 0).all(1)
        length = torch.where(none, x[:, 0], length)
        v = torch.where(none, 0.0, x.T / (x[:, 0] - length)).T
        v[:, 0] = 1
        tau[:, j] = torch.where(none, 0.0, (length - x[:, 0]) / length)
        scaled, rest = v * tau[:, j, None], a[:, j + 1 :, j + 1 :]
        p = (rest @ scaled[..., None])[..., 0]
        w = p - scaled * ((p * v).sum(1, keepdim=True) / 2)
        outer = v[:, :, None] * w[:, None]
        rest -= outer + outer.mT
        a[:, j, j + 1] = a[:, j + 1, j] = length
        a[:, j, j + 2 :] = v[:, 1:]
    beside = torch.nn.functional.pad(a.diagonal(1, 1, 2), (0, 1))
    diagonal = a.diagonal(dim1=1, dim2=2).to(torch.float64, copy=True)  # an op's outputs share none
    return a, tau, diagonal, beside.double()


def tridiagonal_values(diagonal: Tensor, beside: Tensor, count: int) -> Tensor:
    """Returns the largest eigenvalues [b, count] of T, descending."""
    lower = torch.diag_embed(diagonal) + torch.diag_embed(beside[:, :-1], -1)
    values: Tensor = torch.linalg.eigvalsh(lower)
    return values.flip(1)[:, :count].contiguous()


def tridiagonal_vectors(diagonal: Tensor, beside: Tensor, values: Tensor) -> Tensor:
    """Returns eigenvectors of T as rows [b, count, d], float32, of its largest eigenvalues."""
    lower = torch.diag_embed(diagonal) + torch.diag_embed(beside[:, :-1], -1)
    vectors: Tensor = torch.linalg.eigh(lower)[1]
    return vectors.flip(2)[:, :, : values.shape[1]].mT.float().contiguous()
