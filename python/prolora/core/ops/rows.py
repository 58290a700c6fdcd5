"""Native ops on the thin factors of an update, kept as rows [r, m], as torch operators; see `ops`.

project_pair   rows through the subspaces of two bases, range and complement at once
panel_qr       orthonormal rows of thin panels, by Cholesky QR
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..errors import ShapeMismatch
from . import operators

MAX_PANEL_ROWS = 128
"""The most rows panel_qr takes: beyond, reflections cost less than Gram matrices in double."""

# A complement that holds less than this share of a row's squared norm goes through a second time.
_CANCELLED = 1e-2

_library = torch.library.Library("prolora", "FRAGMENT")
_library.define("project_pair(Tensor us, Tensor ut, Tensor x) -> (Tensor, Tensor)")
_library.define("panel_qr(Tensor panel) -> (Tensor, Tensor, Tensor)")


def run_project_pair(
    kernels: ModuleType, us: Tensor, ut: Tensor, x: Tensor, cuda: bool
) -> tuple[Tensor, Tensor]:
    """us: [b, m, ks], ut: [b, m, kt], x: [b, r, m] -> split, moved: [b, 2r, m]."""
    us, ut, x = us.contiguous(), ut.contiguous(), x.contiguous()
    b, r, m = x.shape
    ks, kt = us.shape[2], ut.shape[2]
    coefficients = x.new_empty(b, 2 * r, max(ks, kt))
    split, moved = x.new_empty(b, 2 * r, m), x.new_empty(b, 2 * r, m)
    pointers = [t.data_ptr() for t in (us, ut, x, coefficients, split, moved)]
    with operators._device(x):
        kernels.project_pair(*pointers, b, m, ks, kt, r, *operators._flags(x, cuda))
    return split, moved


def run_panel_qr(kernels: ModuleType, panel: Tensor, cuda: bool) -> tuple[Tensor, Tensor, Tensor]:
    """panel: [b, r, m] -> q [b, r, m], l [b, r, r], rank int64 [b]."""
    panel = panel.contiguous()
    b, r, m = panel.shape
    q, lower = torch.empty_like(panel), panel.new_empty(b, r, r)
    rank = panel.new_empty(b, dtype=torch.int64)
    scratch = panel.new_empty(b, kernels.panel_qr_scratch(r), dtype=torch.float64)
    pointers = [t.data_ptr() for t in (panel, q, lower, rank, scratch)]
    with operators._device(panel):
        kernels.panel_qr(*pointers, b, r, m, *operators._flags(panel, cuda))
    return q, lower, rank


def _project_pair(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    # Speed of the kernel over torch's products on a CPU: 0.5 to 0.9 (float32, Xeon with AVX-512).
    return _multiplied(us, ut, x) if x.is_cpu else run_project_pair(_C, us, ut, x, True)


def _multiplied(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """By torch's products. The second time through is left out where it would change nothing."""
    r = x.shape[1]
    inside = x @ us @ us.mT
    split = torch.cat([inside, x - inside], 1)
    again = _cancelled(split[:, r:], x)
    if len(again):
        more = split[again, r:] @ us[again] @ us[again].mT
        split[again] += torch.cat([more, -more], 1)
    moved = split @ ut @ ut.mT
    torch.sub(split[:, r:], moved[:, r:], out=moved[:, r:])
    again = _cancelled(moved[:, r:], split[:, r:])
    if len(again):
        moved[again, r:] -= moved[again, r:] @ ut[again] @ ut[again].mT
    return split, moved


def _cancelled(rest: Tensor, whole: Tensor) -> Tensor:
    """The matrices of which a row lost nearly all of its length."""
    left = torch.linalg.vector_norm(rest, dim=2).square()
    had = torch.linalg.vector_norm(whole, dim=2).square()
    places: Tensor = (left < _CANCELLED * had).any(1).nonzero().flatten()
    return places


def _keep_bases(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2])


def _project_pair_backward(
    ctx: Any, of_split: Tensor, of_moved: Tensor
) -> tuple[None, None, Tensor]:
    """Projectors are symmetric: P_s(g₁ + P_t g₃) + P_s⊥(g₂ + P_t⊥ g₄)."""
    us, ut = ctx.saved_tensors
    (inside, outside), (within, without) = of_split.chunk(2, 1), of_moved.chunk(2, 1)
    inside = inside + within @ ut @ ut.mT
    outside = outside + without - without @ ut @ ut.mT
    return None, None, outside + (inside - outside) @ us @ us.mT


def _panel_qr(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return run_panel_qr(_C, panel, panel.is_cuda)


def _project_pair_fake(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    b, r, m = x.shape
    return x.new_empty(b, 2 * r, m), x.new_empty(b, 2 * r, m)


def _panel_qr_fake(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, r, m = panel.shape
    rank = panel.new_empty(b, dtype=torch.int64)
    return panel.new_empty(b, r, m), panel.new_empty(b, r, r), rank


for _key in ("CPU", "CUDA"):
    _library.impl("project_pair", _project_pair, _key)
    _library.impl("panel_qr", _panel_qr, _key)
torch.library.register_fake("prolora::project_pair", _project_pair_fake)
torch.library.register_fake("prolora::panel_qr", _panel_qr_fake)
torch.library.register_autograd(
    "prolora::project_pair", _project_pair_backward, setup_context=_keep_bases
)


def project_pair(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x through two subspaces: range to range, complement to complement (METHOD.md §1).

    Complements go through twice: the second time takes out what cancellation left in them.

    Args:
        us: [..., m, ks], orthonormal columns; zero columns are padding and change nothing.
        ut: [..., m, kt], likewise.
        x: [..., r, m].

    Returns:
        split [..., 2r, m]: x usᵀ-inside above x outside, which add up to x; and moved [..., 2r, m]:
        the first inside ut above the second outside ut. Differentiable in x; the bases are taken
        as given.

    Raises:
        TypeError: a dtype other than float32 and float64, or two dtypes or devices.
        ShapeMismatch: shapes that do not agree.
    """
    operators._check("project_pair", us=us, ut=ut, x=x.mT)
    split, moved = torch.ops.prolora.project_pair(*(operators._stack(t) for t in (us, ut, x)))
    shape = (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1])
    return split.reshape(shape), moved.reshape(shape)


def panel_qr(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal rows of thin panels: panel = l q, by Cholesky QR (twice, Gram in float64).

    Args:
        panel: [..., r, m], r <= m, r <= 128.

    Returns:
        q [..., r, m], orthonormal rows; l [..., r, r], lower; rank int64 [...], the rows in use: a
        row that lies in the span of those above it, to 8 eps of its length (1e-7 in float64), is
        dropped: zero in q. Rank -1 (NaN, Inf, or rows too close to each other for this method):
        the other two mean nothing. Not differentiable.

    Raises:
        TypeError: a dtype other than float32 and float64.
        ShapeMismatch: r larger than m or 128.
    """
    operators._check("panel_qr", panel=panel)
    r, m = panel.shape[-2:]
    if r > m or r > MAX_PANEL_ROWS:
        raise ShapeMismatch(
            f"panel_qr: takes [..., r, m] with r <= m and r <= {MAX_PANEL_ROWS}, not {r} x {m}; "
            "use torch.linalg.qr"
        )
    q, lower, rank = torch.ops.prolora.panel_qr(operators._stack(panel))
    lead = panel.shape[:-2]
    return q.reshape(panel.shape), lower.reshape(*lead, r, r), rank.reshape(lead)
