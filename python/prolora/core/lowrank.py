"""Low-rank matrices and stacks of them, stored as two factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import recompression
from .exceptions import ShapeMismatch
from .precision import in_full_precision, working_dtype
from .short_text import format_shape, format_storage
from .validation import check_layout


@dataclass(frozen=True, repr=False, eq=False)
class LowRank:
    """The update ΔW = up @ down of a weight; only `dense` forms the product.

    It can be used like the pair (up, down).

    Attributes:
        up: [..., m, r], the "B" of a LoRA.
        down: [..., r, n], the "A" of a LoRA.
    """

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        """Raises ShapeMismatch if the factors cannot be multiplied."""
        for name, factor in (("up", self.up), ("down", self.down)):
            check_layout(name, factor)
        up, down = self.up.shape, self.down.shape
        if len(up) < 2 or len(up) != len(down) or up[:-2] != down[:-2] or up[-1] != down[-2]:
            swapped = len(up) == len(down) > 1 and up[-2] == down[-1]
            raise ShapeMismatch(
                f"up {list(up)} and down {list(down)} do not multiply: "
                "they must be [..., m, r] and [..., r, n]"
                + ("; were they given in the other order?" if swapped else "")
            )

    def __repr__(self) -> str:
        """Returns, for example, LowRank(64×48, rank 8, float32)."""
        shape, storage = format_shape(self.shape), format_storage(self.up)
        return f"LowRank({shape}, rank {self.rank}, {storage})"

    def __iter__(self) -> Iterator[Tensor]:
        """Yields `up` and `down`: `up, down = update`."""
        return iter((self.up, self.down))

    def __len__(self) -> int:
        """Returns 2, the length of the pair."""
        return 2

    def __getitem__(self, index: int) -> Tensor:
        """Returns `up` for index 0 and `down` for index 1."""
        return (self.up, self.down)[index]

    @property
    def rank(self) -> int:
        """The number of columns of `up` (an upper bound on the rank of the product)."""
        return self.up.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """[..., m, n]."""
        return torch.Size((*self.up.shape[:-1], self.down.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The factors' dtype."""
        return self.up.dtype

    @property
    def device(self) -> torch.device:
        """The factors' device."""
        return self.up.device

    @in_full_precision
    def dense(self) -> Tensor:
        """Returns the product [..., m, n] in the factors' dtype, formed in float32 or better."""
        work = working_dtype(self.dtype)
        return (self.up.to(work) @ self.down.to(work)).to(self.dtype)

    @in_full_precision
    def norm(self) -> Tensor:
        """Returns ‖up·down‖_F [...], in float64.

        Computed from the r×r Gram matrices: tr((upᵀup)(down·downᵀ)).
        """
        up, down = self.up.double(), self.down.double()
        gram = (up.mT @ up) * (down @ down.mT)
        return gram.sum((-2, -1)).clamp_min(0).sqrt()

    def to(self, where: torch.dtype | torch.device | str) -> LowRank:
        """Casts both factors to a dtype or moves them to a device."""
        return LowRank(self.up.to(where), self.down.to(where))

    def truncate(self, rank: int | None = None, energy: float | None = None) -> LowRank:
        """Returns the closest product of lower rank (Eckart–Young).

        Its factors are balanced: U√S and √S·Vᵀ.

        Args:
            rank: keep at most this many singular values.
            energy: keep the fewest that hold this share of Σσ², for every matrix of the stack.

        Returns:
            Factors of the smaller rank, without gradients; with neither argument, the same product
            re-factored.
        """
        return LowRank(*recompression.recompress_factors(self.up, self.down, rank, energy))
