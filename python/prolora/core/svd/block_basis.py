"""The basis of a block Krylov iteration, for a stack of matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .panels import orthonormalise_panel
from .products import FormedGram, ImpliedGram
from .stacks import take_places


@dataclass
class BlockBasis:
    """An orthonormal basis that grows by blocks, and G = wwᵀ projected on it.

    Where a matrix gives no further direction, the basis has a zero row instead, and the iteration
    of the others goes on.

    Attributes:
        gram: products with G.
        w: [b, d, n], float32.
        norm: [b], ‖w‖_F.
        rows: [b, largest, d], the first `size` of which are in use.
        projected: [b, largest, largest], the lower triangle of the projection.
        scale: [b], float64, the length of the last block's image: what rounding is relative to.
        width: of a block.
        size: of the basis.
    """

    gram: FormedGram | ImpliedGram
    w: Tensor
    norm: Tensor
    rows: Tensor
    projected: Tensor
    scale: Tensor
    width: int
    size: int = 0

    @classmethod
    def begin(
        cls, gram: FormedGram | ImpliedGram, w: Tensor, norm: Tensor, start: Tensor, blocks: int
    ) -> BlockBasis:
        """The basis of the rows of `start` [b, width, d], with room for so many blocks."""
        b, width, d = start.shape
        largest = blocks * width
        rows, projected = w.new_empty(b, largest, d), w.new_zeros(b, largest, largest)
        basis = cls(gram, w, norm, rows, projected, torch.ones_like(norm), width)
        basis.append(start)
        return basis

    @property
    def largest(self) -> int:
        """The size at which the basis is full."""
        return self.rows.shape[1]

    def expand(self) -> Tensor:
        """What G adds to the basis: the image [b, width, d] of its last block, orthogonal to it.

        Classical Gram-Schmidt, twice. Its coefficients are the last rows of the projection.
        """
        known = self.rows[:, : self.size]
        last = slice(self.size - self.width, self.size)
        image = self.gram.rough(known[:, last])
        first = image @ known.mT
        image = torch.baddbmm(image, first, known, alpha=-1)
        second = image @ known.mT
        image = torch.baddbmm(image, second, known, alpha=-1)
        column = first + second
        self.projected[:, last, : self.size] = column
        self.scale = torch.linalg.vector_norm(column, dim=(-2, -1)).double()
        return image

    def append(self, image: Tensor) -> None:
        """Adds the span of an image [b, width, d] that is orthogonal to the basis."""
        block = orthonormalise_panel(image, self.scale)
        self.rows[:, self.size : self.size + self.width] = block
        self.size += self.width

    def penalised(self) -> Tensor:
        """The projection [b, size, size] with −‖w‖² in the place of the zero rows.

        So these are exact eigenvectors, behind all others.
        """
        zero = torch.linalg.vector_norm(self.rows[:, : self.size], dim=-1) < 0.5
        projected = self.projected[:, : self.size, : self.size]
        diagonal = projected.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.where(zero, -self.norm.square().float()[:, None], diagonal))
        return projected

    def counts_zero_rows(self, value: Tensor) -> Tensor:
        """Whether an eigenvalue [b] of `penalised` is that of a zero row: bool [b]."""
        return value < -self.norm.square() / 2

    def take(self, places: list[int]) -> BlockBasis:
        """The basis of some matrices of the stack."""
        if places == list(range(len(self.w))):
            return self
        return replace(
            self,
            gram=self.gram.take(places),
            w=take_places(self.w, places),
            norm=take_places(self.norm, places),
            rows=take_places(self.rows, places),
            projected=take_places(self.projected, places),
            scale=take_places(self.scale, places),
        )
