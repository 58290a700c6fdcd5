"""Orthonormal rows of thin panels, without a decision of the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.panel_qr import panel_qr
from ..ops.torch_twin import DEPENDENT
from .stacks import decides_freely


def orthonormalise_panel(panel: Tensor, scale: Tensor) -> Tensor:
    """Makes the rows of a panel [b, c, d], float32, orthonormal: CholQR twice.

    A GPU's stacks go through the kernel `panel_qr`. Its triangular factor is of no use here, and on
    the CPU the same passes without it take two thirds of the time.

    The Gram matrix of the first pass is in float64, so that a condition of 1e6 is no trouble, and
    shifted by what is rounding, so that its factor exists; the second pass takes the shift out.
    What is shorter than that becomes a zero row.

    panel: any rows, c ≤ d; scale: [b], float64, the length that rounding is relative to.
    """
    if not decides_freely(panel):
        # A panel that it gives up adds nothing to the basis.
        return panel_qr(panel, scale)[0].nan_to_num(0.0)
    wide = panel.double()
    shift = (DEPENDENT * scale).square()
    gram = wide @ wide.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
    inverse, pivots = _invert_factor(gram)
    dropped = ~(pivots.square() > 2 * shift[:, None])  # NaN too
    q = torch.where(dropped[..., None], 0.0, inverse @ panel)
    gram = (q @ q.mT).double()
    gram.diagonal(dim1=-2, dim2=-1).add_(dropped.double())
    return _invert_factor(gram)[0] @ q


def _invert_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the inverse Cholesky factor [b, c, c] in float32, and the factor's diagonal."""
    factor, _ = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse.float(), factor.diagonal(dim1=-2, dim2=-1)
