"""Products whose shape or symmetry can be made use of."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .stacks import take_places

# Row blocks of a Gram matrix, and how tall they must be to be worth it.
BLOCKS = 4
MIN_BLOCK = 64
# Columns of a float32 matrix that are taken to float64 at a time.
PANEL = 640


@dataclass
class FormedGram:
    """Products with G = wwᵀ of a stack, from G itself."""

    precise: Tensor  # G [b, d, d] in float64

    @cached_property
    def single(self) -> Tensor:
        """The same in float32."""
        return self.precise.float()

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies the rows of x [b, c, d], float64, by G."""
        return x @ self.precise

    def rough(self, x: Tensor) -> Tensor:
        """Multiplies in float32."""
        return x @ self.single

    def take(self, places: list[int]) -> FormedGram:
        """Selects matrices of the stack."""
        return FormedGram(take_places(self.precise, places))


@dataclass
class ImpliedGram:
    """Products with G = wwᵀ of a stack, from w: cheaper where only few are needed."""

    single: Tensor  # w [b, d, n] in float32, perhaps a transposed view

    @cached_property
    def precise(self) -> Tensor:
        """The same in float64."""
        return self.single.double()

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies the rows of x [b, c, d], float64, by G."""
        return x @ self.precise @ self.precise.mT

    def rough(self, x: Tensor) -> Tensor:
        """Multiplies in float32."""
        return x @ self.single @ self.single.mT

    def take(self, places: list[int]) -> ImpliedGram:
        """Selects matrices of the stack."""
        return ImpliedGram(take_places(self.single, places))


def multiply_narrow(w: Tensor, x: Tensor) -> Tensor:
    """Multiplies a large w [..., m, n] by a narrow x [..., n, c].

    Where w is a transposed view, xᵀ times the matrix in memory reads it row by row and takes half
    the time for narrow x; the result then is a transposed view too.
    """
    if w.stride(-1) == 1 or w.stride(-2) != 1:
        return w @ x
    return (x.mT @ w.mT).mT


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


AnyGram = FormedGram | ImpliedGram
"""What gives products with the Gram matrices of a stack."""
