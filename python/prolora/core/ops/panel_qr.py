"""panel_qr: orthonormal rows of thin panels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..errors import ShapeMismatch
from . import native, torch_twin
from .operands import ANY_DEVICE, check_operands, flatten_stack, library

MAX_PANEL_ROWS = 128
"""The most rows panel_qr takes: beyond, reflections cost less than Gram matrices in double."""

library.define("panel_qr(Tensor panel) -> (Tensor, Tensor, Tensor)")


def run_panel_qr(kernels: ModuleType, panel: Tensor, cuda: bool) -> tuple[Tensor, Tensor, Tensor]:
    """panel: [b, r, m] -> q [b, r, m], l [b, r, r], rank int64 [b]."""
    panel = panel.contiguous()
    b, r, m = panel.shape
    q, lower = torch.empty_like(panel), panel.new_empty(b, r, r)
    rank = panel.new_empty(b, dtype=torch.int64)
    scratch = panel.new_empty(b, kernels.panel_qr_scratch(r), dtype=torch.float64)
    native.run_kernel(kernels, "panel_qr", (panel, q, lower, rank, scratch), (b, r, m), cuda)
    return q, lower, rank


def _panel_qr(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kernels = native.kernels_for("panel_qr", panel.device)
    if kernels is None:
        return torch_twin.panel_qr(panel)
    return run_panel_qr(kernels, panel, panel.is_cuda)


def _panel_qr_fake(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, r, m = panel.shape
    rank = panel.new_empty(b, dtype=torch.int64)
    return panel.new_empty(b, r, m), panel.new_empty(b, r, r), rank


library.impl("panel_qr", _panel_qr, ANY_DEVICE)
torch.library.register_fake("prolora::panel_qr", _panel_qr_fake)


def panel_qr(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal rows of thin panels: panel = l q.

    The extension takes Cholesky QR (twice, Gram matrices in float64), the torch twin reflections.

    Args:
        panel: [..., r, m], r ≤ m, r ≤ 128.

    Returns:
        q [..., r, m], orthonormal rows; l [..., r, r], lower; rank int64 [...], the rows in use: a
        row that lies in the span of those above it, to 8 eps of its length (1e-7 in float64), is
        dropped: zero in q. Rank -1 (NaN, Inf, or rows too close to each other for Cholesky): the
        other two mean nothing. Not differentiable.

    Raises:
        TypeError: a dtype other than float32 and float64.
        ShapeMismatch: r larger than m or 128.
    """
    check_operands("panel_qr", panel=panel)
    r, m = panel.shape[-2:]
    if r > m or r > MAX_PANEL_ROWS:
        raise ShapeMismatch(
            f"panel_qr: takes [..., r, m] with r <= m and r <= {MAX_PANEL_ROWS}, not {r} x {m}; "
            "use torch.linalg.qr"
        )
    q, lower, rank = torch.ops.prolora.panel_qr(flatten_stack(panel))
    lead = panel.shape[:-2]
    return q.reshape(panel.shape), lower.reshape(*lead, r, r), rank.reshape(lead)
