"""The few largest eigenpairs of a Gram matrix in float64: what hides the others from float32.

Rounding in float32 is relative to the largest eigenvalue. Where that is far above the others, these
pairs are found first, by a short block Krylov iteration in float64, and taken out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import EPS, EPS32
from .products import AnyGram
from .tuning import TUNING

# Pairs count as found where their residual is rounding of float32 at their own eigenvalue.
CONVERGED = EPS32 / 4
# Rows that share more than this with the basis are taken out of it once more.
LEANING = 1e-12


@dataclass(frozen=True)
class LeadingPairs:
    """Leading eigenpairs (x, θ) of one G [d, d]."""

    rows: Tensor  # x [q, d], float64, orthonormal
    theta: Tensor  # [q], descending


def find_head(gram: AnyGram, trace: float, d: int, steep: float) -> LeadingPairs | None:
    """Finds the converged leading pairs of one matrix; None where its spectrum is not steep.

    gram: products with G [1, d, d]; trace: of G; d: its size; steep: a first eigenvalue above so
    many times the mean one behind the head calls for one.
    """
    width = TUNING.head_width
    generator = torch.Generator("cpu").manual_seed(0)
    block = torch.randn(width, d, generator=generator, dtype=torch.float64, device="cpu")
    blocks = max(TUNING.head_most_blocks, d // TUNING.rows_per_head_block)
    most = min(blocks, d // (4 * width)) * width
    basis, projected = block.new_empty(most, d), block.new_zeros(most, most)
    block = _orthonormal_rows(block)
    for size in range(width, most + 1, width):
        basis[size - width : size] = block
        earlier = basis[:size]
        image = gram(block[None])[0]
        column = image @ earlier.mT
        image -= column @ earlier
        projected[size - width : size, :size] = column
        if size == TUNING.head_first_blocks * width or size == most:
            values, vectors = torch.linalg.eigh(projected[:size, :size])
            theta, vectors = values.flip(0), vectors.flip(1)
            rest = max(trace - float(theta.sum()), 0.0) / (d - size)
            if not float(theta[0]) > steep * rest:
                return None
        if size < most:
            block = _orthonormal_rows(image - (image @ earlier.mT) @ earlier)
            again = block @ earlier.mT
            if float(again.abs().max()) > LEANING:  # G has nothing more to give
                block = _orthonormal_rows(block - again @ earlier)
    left = torch.linalg.vector_norm(image) * torch.linalg.vector_norm(vectors[-width:], dim=0)
    good = (left <= CONVERGED * theta) & (theta > d * EPS * theta[0])
    q = int(good.long().cumprod(0).sum())
    return LeadingPairs(vectors[:, :q].mT @ basis, theta[:q]) if q else None


def _orthonormal_rows(rows: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(rows.mT)[0].mT
    return basis
