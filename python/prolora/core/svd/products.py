"""Products whose shape or symmetry can be made use of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..ops.precise_product import precise_product
from .stacks import decides_freely, take_places


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
        # G is its transpose; a CPU multiplies as it always did, to the last bit.
        return x @ self.precise if decides_freely(x) else precise_product(x, self.precise)

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
        return precise_product(precise_product(x, self.precise.mT), self.precise)

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


AnyGram = FormedGram | ImpliedGram
"""What gives products with the Gram matrices of a stack."""
