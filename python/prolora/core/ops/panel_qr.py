"""panel_qr: orthonormal rows of thin panels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from . import native, torch_twin
from .operands import ANY_DEVICE, NAMESPACE, check_operands, flatten_stack, library, registered

MAX_PANEL_ROWS = 128
"""The most rows panel_qr takes: beyond, reflections cost less than Gram matrices."""

library.define("panel_qr(Tensor panel, Tensor? scale=None) -> (Tensor, Tensor, Tensor)")


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
        size = kernels.panel_qr_scratch(b, r, False, cuda)
    scratch = torch.empty(size, dtype=torch.uint8, device=panel.device)
    tensors = (panel, scale, q, lower, rank, scratch)
    native.run_kernel(kernels, "panel_qr", tensors, (b, r, m), cuda)
    return q, lower, rank


def _panel_qr(panel: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    both = run_panel_qr, torch_twin.panel_qr
    return native.run_best("panel_qr", panel, panel.shape, *both, (panel, scale), _compare)


def _compare(result: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Computes what does not depend on the rounding of rows that lie close together."""
    q, lower, rank = result
    return [lower @ q, q @ q.mT, rank.double()]


def _panel_qr_fake(panel: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    b, r, m = panel.shape
    rank = panel.new_empty(b, dtype=torch.int64)
    return panel.new_empty(b, r, m), panel.new_empty(b, r, r), rank


library.impl("panel_qr", _panel_qr, ANY_DEVICE)
torch.library.register_fake(f"{NAMESPACE}::panel_qr", _panel_qr_fake)


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
