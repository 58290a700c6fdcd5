"""The basis of a block Krylov iteration, for a stack of matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.krylov_block import krylov_block
from .panels import extend_basis
from .products import FormedGram, ImpliedGram
from .stacks import take_places


@dataclass
class BlockBasis:
    """Growing orthonormal basis, and G = wwᵀ projected on it.

    It has a zero row where a matrix gives no further direction.
    """

    gram: FormedGram | ImpliedGram  # products with G
    w: Tensor  # [b, d, n], float32
    norm: Tensor  # [b], ‖w‖_F
    rows: Tensor  # [b, largest, d], the first `size` of which are in use
    projected: Tensor  # [b, largest, largest], the lower triangle of the projection
    width: int  # of a block
    stored: Tensor | None  # w in 16 bits, where the op `krylov_block` is to find the blocks
    image: Tensor | None  # [b, width, d], what is to be added; None where the op has added it
    # [b], float64, the length of `image` before what the basis holds was taken out: what rounding
    # is relative to.
    scale: Tensor | None
    found: Tensor | None = None  # [b], float64, the length that the op has told
    size: int = 0  # of the basis

    @classmethod
    def begin(
        cls,
        gram: FormedGram | ImpliedGram,
        w: Tensor,
        norm: Tensor,
        start: Tensor,
        blocks: int,
        stored: Tensor | None = None,
    ) -> BlockBasis:
        """Starts with the rows of `start` [b, width, d] and room for so many blocks."""
        b, width, d = start.shape
        largest = blocks * width
        rows, projected = w.new_empty(b, largest, d), w.new_zeros(b, largest, largest)
        scale = torch.ones_like(norm)
        basis = cls(gram, w, norm, rows, projected, width, stored, start, scale)
        basis.append()
        return basis

    @property
    def largest(self) -> int:
        """The size at which the basis is full."""
        return self.rows.shape[1]

    def expand(self) -> None:
        """Finds what G adds to the basis, and the last rows of the projection."""
        if self.stored is not None:
            self.found = krylov_block(self.stored, self.rows, self.projected, self.size, self.width)
            return
        earlier = self.rows[:, : self.size]
        last = slice(self.size - self.width, self.size)
        image = self.gram.multiply_f32(earlier[:, last])
        column = image @ earlier.mT
        self.image = torch.baddbmm(image, column, earlier, alpha=-1)
        self.projected[:, last, : self.size] = column
        self.scale = torch.linalg.vector_norm(column, dim=(-2, -1)).double()

    def length(self) -> Tensor:
        """Returns the length [b], float64, of what `expand` has found."""
        if self.image is None:
            assert self.found is not None
            return self.found
        length: Tensor = torch.linalg.vector_norm(self.image, dim=(-2, -1)).double()
        return length

    def append(self) -> None:
        """Adds what `expand` has found."""
        if self.image is not None and self.scale is not None:
            block = extend_basis(self.image, self.scale, self.rows[:, : self.size])
            self.rows[:, self.size : self.size + self.width] = block
            self.image = self.scale = None
        self.size += self.width

    def penalised(self) -> Tensor:
        """Returns the projection [b, size, size] with −‖w‖² for the zero rows.

        So these are exact eigenvectors, behind all others.
        """
        zero = torch.linalg.vector_norm(self.rows[:, : self.size], dim=-1) < 0.5
        projected = self.projected[:, : self.size, : self.size]
        diagonal = projected.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.where(zero, -self.norm.square().float()[:, None], diagonal))
        return projected

    def counts_zero_rows(self, value: Tensor) -> Tensor:
        """Returns whether an eigenvalue [b] of `penalised` is a zero row's: bool [b]."""
        return value < -self.norm.square() / 2

    def take(self, places: list[int]) -> BlockBasis:
        """Selects matrices of the stack."""
        if places == list(range(len(self.w))):
            return self
        names = ("w", "norm", "rows", "projected", "stored", "image", "scale", "found")
        tensors = {name: getattr(self, name) for name in names}
        taken: dict[str, Any] = {
            name: take_places(x, places) for name, x in tensors.items() if x is not None
        }
        return replace(self, gram=self.gram.take(places), **taken)

    def take_grown(self, places: list[int]) -> BlockBasis:
        """Selects matrices for a basis that has grown: without what only growth needs."""
        return replace(self, stored=None, image=None, scale=None, found=None).take(places)
