"""Orthonormal rows of thin panels, without a decision of the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.panel_qr import DEPENDENT, panel_qr
from .stacks import is_on_host


def extend_basis(panel: Tensor, scale: Tensor, earlier: Tensor) -> Tensor:
    """Makes rows [b, c, d] orthonormal, and orthogonal to a basis they have little of.

    Where little is left of a row, the rounding of what was taken out leans on the basis: that is
    taken out once more, from rows of length 1, between the passes of a Cholesky QR. (A second pass
    only where less than a tenth of a row is left saves 0 to 8 % at k = 128 of 1280²; at a
    thirtieth, bounds are no longer proven.)

    A GPU's stacks go through the kernel `panel_qr`, twice. On the CPU the same passes without its
    triangular factor take two thirds of the time. The Gram matrix of the first pass is in float64,
    so that a condition of 1e6 is no trouble, and shifted by what is rounding, so that its factor
    exists; the second pass takes the shift out. What is shorter than that becomes a zero row.

    panel: float32, c ≤ d, without what the basis `known` [b, size, d] holds of it, to rounding;
    scale: [b], float64, the length that rounding is relative to.
    """
    if not is_on_host(panel):
        # A panel that it gives up adds nothing to the basis.
        rows = _take_out(panel_qr(panel, scale)[0].nan_to_num(0.0), earlier)
        return panel_qr(rows, torch.ones_like(scale))[0].nan_to_num(0.0)
    wide = panel.double()
    shift = (DEPENDENT * scale).square()
    gram = wide @ wide.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
    inverse, pivots = _invert_factor(gram)
    dropped = ~(pivots.square() > 2 * shift[:, None])  # NaN too
    q = _take_out(torch.where(dropped[..., None], 0.0, inverse @ panel), earlier)
    gram = (q @ q.mT).double()
    gram.diagonal(dim1=-2, dim2=-1).add_(dropped.double())
    return _invert_factor(gram)[0] @ q


def _take_out(rows: Tensor, earlier: Tensor) -> Tensor:
    return torch.baddbmm(rows, rows @ earlier.mT, earlier, alpha=-1)


def _invert_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the inverse Cholesky factor [b, c, c] in float32, and the factor's diagonal."""
    factor, _ = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse.float(), factor.diagonal(dim1=-2, dim2=-1)
