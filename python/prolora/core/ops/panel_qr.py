"""panel_qr: orthonormal rows of thin panels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from . import native
from .operands import check_operands, flatten_stack, register, registered

MAX_PANEL_ROWS = 128
"""The most rows panel_qr takes: beyond, reflections cost less than Gram matrices."""

# A row that the rows above it reduce to this share of its length or less is dropped, and one of
# which no more than this share of the scale is left.
DROPPED, DEPENDENT = 8 * 2.0**-23, 1e-6
TINY, HUGE = 1e-290, 1e200  # squared lengths below and above all rows'
# By this share the twin raises the diagonal to find such rows: above the rounding of float64.
SHIFT = 1e-14
EXPONENT_BITS = 0x7F800000  # of float32


def run_panel_qr(
    kernels: ModuleType, panel: Tensor, scale: Tensor | None, cuda: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the kernel on panel [b, r, m] with scale float64 [b].

    It returns q [b, r, m], l [b, r, r] and rank int64 [b].
    """
    panel = panel.contiguous()
    b, r, m = panel.shape
    # The address of a tensor without elements is 0.
    scale = panel.new_empty(0, dtype=torch.float64) if scale is None else scale.contiguous()
    q, lower = torch.empty_like(panel), panel.new_empty(b, r, r)
    rank = panel.new_empty(b, dtype=torch.int64)
    with native.on_device(panel):
        size = kernels.panel_qr_scratch(b, r, cuda)
    tensors = {
        "panel": panel,
        "scale": scale,
        "q": q,
        "l": lower,
        "rank": rank,
        "scratch": torch.empty(size, dtype=torch.uint8, device=panel.device),
    }
    sizes = {"batch": b, "r": r, "m": m}
    native.run_kernel(kernels, "panel_qr", cuda, False, tensors, sizes)
    return q, lower, rank


def factor_panel(panel: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
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


def _compare(result: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Computes what does not depend on the rounding of rows that lie close together."""
    q, lower, rank = result
    return [lower @ q, q @ q.mT, rank.double()]


def _panel_qr_fake(panel: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    b, r, m = panel.shape
    rank = panel.new_empty(b, dtype=torch.int64)
    return panel.new_empty(b, r, m), panel.new_empty(b, r, r), rank


native.OPS["panel_qr"] = native.Op(run_panel_qr, factor_panel, _compare, on_cpu=native.PRODUCTS)
register(
    "panel_qr(Tensor panel, Tensor? scale=None) -> (Tensor, Tensor, Tensor)",
    lambda panel, scale=None: native.run_best("panel_qr", panel, panel.shape, panel, scale),
    _panel_qr_fake,
)


def panel_qr(panel: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Makes rows of thin panels orthonormal by Cholesky QR: panel = l q.

    Nothing waits for the device.

    panel: [..., r, m], float32, r ≤ m, r ≤ 128, r·m < 2³¹; scale: float64 [...]; the rest of a row
    must be longer than 1e-6 of it, for rows that are the rounding of something longer. Returns q
    [..., r, m], orthonormal rows; l [..., r, r], lower; rank int64 [...], the rows in use: a row in
    the span of the rows above it, to 8 eps of its length or 1e-6 of `scale`, is dropped: a zero row
    of q, a zero column of l. Rank -1: the other two are NaN, because the panel holds NaN or Inf or
    rows too close to each other for Cholesky. Not differentiable.

    Raises:
        TypeError: a dtype other than float32, or a scale other than float64 on the same device.
        ShapeMismatch: r larger than m or 128, or a scale that is not one number a panel.
    """
    check_operands("panel_qr", panel=panel)
    if panel.dtype != torch.float32:
        raise TypeError("panel_qr: panel must be float32; use torch.linalg.qr for float64")
    r, m = panel.shape[-2:]
    if r > m or r > MAX_PANEL_ROWS or r * m >= 2**31:
        raise ShapeMismatch(
            f"panel_qr: takes [..., r, m] with r <= m and r <= {MAX_PANEL_ROWS}, not {r} x {m}; "
            "use torch.linalg.qr"
        )
    lead = panel.shape[:-2]
    if scale is not None:
        if scale.dtype != torch.float64 or scale.device != panel.device:
            raise TypeError(
                f"panel_qr: scale must be float64 on {panel.device}, "
                f"not {scale.dtype} on {scale.device}"
            )
        if scale.shape != lead:
            raise ShapeMismatch(
                f"panel_qr: scale must be {tuple(lead)}, one number a panel, "
                f"not {tuple(scale.shape)}"
            )
        scale = scale.reshape(lead.numel())
    q, lower, rank = registered.panel_qr(flatten_stack(panel), scale)
    return q.reshape(panel.shape), lower.reshape(*lead, r, r), rank.reshape(lead)
