"""Gram matrices, computed by one half."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# Row blocks of a Gram matrix, and how tall they must be to be worth it.
BLOCKS = 4
MIN_BLOCK = 64
# Columns of a float32 matrix that are taken to float64 at a time.
PANEL = 640


def lower_gram(w: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Computes wwᵀ of w [..., d, n] in `dtype`; only its lower triangle means anything.

    `eigh` and `cholesky` read no more, and five eighths of the flops fill it. A w of another dtype
    is converted panel by panel, because a full copy would be twice its size.
    """
    *batch, d, n = w.shape
    flat = w.reshape(-1, d, n)
    gram = w.new_empty(len(flat), d, d, dtype=dtype)
    for i, panel in enumerate(flat.split(n if w.dtype == dtype else PANEL, -1)):
        part = panel.to(dtype)
        for low, high in _row_blocks(d):
            rows = gram[:, low:high, :high]
            torch.baddbmm(rows, part[:, low:high], part[:, :high].mT, beta=min(i, 1), out=rows)
    return gram.reshape(*batch, d, d)


def upper_gram(w: Tensor) -> Tensor:
    """Computes wwᵀ [b, d, d] of w [b, d, n] in its dtype; only its upper triangle means anything.

    Five eighths of the flops of the product fill it.
    """
    blocks = _row_blocks(w.shape[1])
    if len(blocks) == 1:
        return w @ w.mT
    gram = w.new_empty(len(w), w.shape[1], w.shape[1])
    for low, high in blocks:
        torch.bmm(w[:, low:high], w[:, low:].mT, out=gram[:, low:high, low:])
    return gram


def mirror_lower(lower: Tensor) -> Tensor:
    """Completes the symmetric matrix whose lower part `lower_gram` gave; in place."""
    d = lower.shape[-1]
    for low, high in _row_blocks(d):
        lower[..., :low, low:high] = lower[..., low:high, :low].mT
    return lower


def _row_blocks(d: int) -> list[tuple[int, int]]:
    blocks = max(1, min(BLOCKS, d // MIN_BLOCK))
    edges = [d * i // blocks for i in range(blocks + 1)]
    return list(itertools.pairwise(edges))
