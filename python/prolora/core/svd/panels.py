"""Orthonormal rows of thin panels. On a GPU the host never waits for a result."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.krylov_block import OUTSIDE
from ..ops.panel_qr import DEPENDENT, panel_qr
from .stacks import is_on_host


def extend_basis(panel: Tensor, scale: Tensor, earlier: Tensor) -> Tensor:
    """Makes rows [b, c, d] orthonormal to each other and to the rows of a basis.

    If little of a row is left after the basis was subtracted, the rounding errors of the
    subtraction are a large part of it, and they are not orthogonal to the basis. So the basis is
    subtracted once more, from unit rows, between the two passes of a Cholesky QR. A row of which
    less than OUTSIDE is then left was nothing but rounding errors, and becomes a zero row. (Doing
    this only if less than a tenth of a row is left saves 0 to 8 % at k = 128 of 1280²; at a
    thirtieth, bounds are no longer proven.)

    On a GPU the kernel `panel_qr` does both passes. On a CPU the same passes without its triangular
    factor take two thirds of the time. The Gram matrix of the first pass is in float64, which is
    exact enough for a condition of 1e6. The square of the rounding error is added to its diagonal,
    so that its Cholesky factor exists; the second pass removes the effect. Shorter rows become zero
    rows.

    Args:
        panel: [b, c, d], float32, c ≤ d, from which the basis was subtracted once.
        scale: [b], float64, the length before that: rounding errors are relative to it.
        earlier: [b, size, d], the orthonormal rows of the basis.
    """
    if not is_on_host(panel):
        # A panel that it gives up adds nothing to the basis.
        rows = _take_out(panel_qr(panel, scale)[0].nan_to_num(0.0), earlier)
        outside = torch.full_like(scale, OUTSIDE / DEPENDENT)
        return panel_qr(rows, outside)[0].nan_to_num(0.0)
    wide = panel.double()
    shift = (DEPENDENT * scale).square()
    gram = wide @ wide.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
    inverse, pivots = _invert_factor(gram)
    dropped = ~(pivots.square() > 2 * shift[:, None])  # NaN too
    q = _take_out(torch.where(dropped[..., None], 0.0, inverse @ panel), earlier)
    gram = (q @ q.mT).double()
    gram.diagonal(dim1=-2, dim2=-1).add_(dropped.double())
    inverse, pivots = _invert_factor(gram)
    rows = inverse @ q
    for i in (~(pivots > OUTSIDE).all(-1)).nonzero()[:, 0].tolist():
        _, lengths, directions = torch.linalg.svd(q[i], full_matrices=False)
        rows[i] = torch.where((lengths > OUTSIDE)[:, None], directions, 0.0)
    return rows


def _take_out(rows: Tensor, earlier: Tensor) -> Tensor:
    return torch.baddbmm(rows, rows @ earlier.mT, earlier, alpha=-1)


def _invert_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the inverse Cholesky factor [b, c, c] in float32, and the factor's diagonal.

    The diagonal is NaN if the matrix has no factor.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    factor.diagonal(dim1=-2, dim2=-1)[info > 0] = torch.nan
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse.float(), factor.diagonal(dim1=-2, dim2=-1)
