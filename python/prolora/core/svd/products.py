"""Products whose shape or symmetry can be made use of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..ops.precise_product import TERM_ERROR, measured_product, precise_product
from .stacks import is_on_host, take_places

# Errors that add up with random signs are taken this many times their expected sum.
CAUTION = 8


@dataclass
class FormedGram:
    """Products with G = wwᵀ of a stack, from G itself."""

    precise: Tensor  # G [b, d, d] in float64
    # [b], by how much more than float64's own sums G and a product with it may err, as ‖·‖_F
    error: Tensor

    @classmethod
    def of(cls, w: Tensor) -> FormedGram:
        """Forms wwᵀ of w [b, d, n]."""
        precise, error = measured_product(w)
        # A product with G in digits, of unit rows: its digits are not those of G, so that errors of
        # terms add up as random ones do.
        largest = precise.abs().amax(2)
        of_products = torch.linalg.vector_norm(largest, dim=1) * digit_error(w.shape[1])
        return cls(precise, error + torch.where(error > 0, of_products, 0.0))

    @cached_property
    def single(self) -> Tensor:
        """The same in float32."""
        return self.precise.float()

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies the rows of x [b, c, d], float64, by G."""
        # G is its transpose; a CPU multiplies as it always did, to the last bit.
        return x @ self.precise if is_on_host(x) else precise_product(x, self.precise)

    def multiply_f32(self, x: Tensor) -> Tensor:
        """Multiplies in float32."""
        return x @ self.single

    def take(self, places: list[int]) -> FormedGram:
        """Selects matrices of the stack."""
        return FormedGram(take_places(self.precise, places), take_places(self.error, places))


@dataclass
class ImpliedGram:
    """Products with G = wwᵀ of a stack, from w: cheaper where only few are needed."""

    single: Tensor  # w [b, d, n] in float32, perhaps a transposed view

    @cached_property
    def error(self) -> Tensor:
        """[b], as of `FormedGram`, for products by digits on a GPU."""
        norm: Tensor = torch.linalg.vector_norm(self.single, dim=(1, 2), dtype=torch.float64)
        if is_on_host(self.single):
            return torch.zeros_like(norm)
        errors = list[Tensor]()
        for side, depth in enumerate(self.single.shape[1:], 1):
            largest = self.single.abs().amax(side).double()
            errors.append(torch.linalg.vector_norm(largest, dim=1) * digit_error(depth))
        return norm * (errors[0] + errors[1])

    @cached_property
    def precise(self) -> Tensor:
        """The same in float64."""
        return self.single.double()

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies the rows of x [b, c, d], float64, by G."""
        return precise_product(precise_product(x, self.precise.mT), self.precise)

    def multiply_f32(self, x: Tensor) -> Tensor:
        """Multiplies in float32."""
        return multiply_narrow(self.single, multiply_narrow(self.single.mT, x.mT)).mT

    def take(self, places: list[int]) -> ImpliedGram:
        """Selects matrices of the stack."""
        return ImpliedGram(take_places(self.single, places))


def digit_error(depth: int) -> float:
    """Returns the error of a sum of digits over two rows' largest numbers.

    Of random signs, with caution; a power of two is up to twice the number below it.
    """
    return CAUTION * math.sqrt(depth) * 4 * TERM_ERROR


def multiply_narrow(w: Tensor, x: Tensor) -> Tensor:
    """Multiplies a large w [..., m, n] by a narrow x [..., n, c].

    Where w is a transposed view, xᵀ times the matrix in memory reads it row by row and takes half
    the time for narrow x; the result then is a transposed view too.
    """
    if w.stride(-1) == 1 or w.stride(-2) != 1:
        return w @ x
    return (x.mT @ w.mT).mT


AnyGram = FormedGram | ImpliedGram
"""What gives products with the Gram matrices of a stack."""
