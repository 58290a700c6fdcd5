"""Products whose shape or symmetry can be made use of."""

from __future__ import annotations

import itertools

from torch import Tensor

# Row blocks of a Gram matrix, and how tall they must be to be worth it.
BLOCKS = 4
MIN_BLOCK = 64


def times(w: Tensor, x: Tensor) -> Tensor:
    """The product of a large w [..., m, n], perhaps a transposed view, and a narrow x [..., n, c].

    Where w is a transposed view, xᵀ times the matrix in memory reads it row by row and takes half
    the time for narrow x; the result then is a transposed view too.
    """
    if w.stride(-1) == 1 or w.stride(-2) != 1:
        return w @ x
    return (x.mT @ w.mT).mT


def lower_gram(w: Tensor) -> Tensor:
    """wwᵀ [..., d, d] of w [..., d, n] without most of what lies above the diagonal.

    `eigh` reads the lower triangle only, and five eighths of the flops fill it.
    """
    d = w.shape[-2]
    if d < BLOCKS * MIN_BLOCK:
        return w @ w.mT
    gram = w.new_zeros(*w.shape[:-1], d)
    for low, high in _blocks(d):
        gram[..., low:high, :high] = w[..., low:high, :] @ w[..., :high, :].mT
    return gram


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of which `lower_gram` gave the lower part; in place."""
    d = lower.shape[-1]
    for low, high in _blocks(d):
        lower[..., :low, low:high] = lower[..., low:high, :low].mT
    return lower


def _blocks(d: int) -> list[tuple[int, int]]:
    edges = [d * i // BLOCKS for i in range(BLOCKS + 1)]
    return list(itertools.pairwise(edges))
