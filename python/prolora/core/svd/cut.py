"""Where the vectors to keep end, for each matrix of a stack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Numbers of vectors to keep, and a window around the last one.

    Vectors are rows here. A matrix keeps the rows [0, count); the window [start, end) has the cut
    in its middle wherever there is room on both sides, and the same width in every matrix.
    """

    count: Tensor  # int64 [b]
    # least, most: the extremes of `count`, as the host knows them.
    least: int
    most: int
    # start, end: int64 [b].
    start: Tensor
    end: Tensor
    guard: int  # half the width of the window
    near: int  # the largest `end`
    kept: Tensor  # bool [b, most], the rows that are kept

    @property
    def uniform(self) -> bool:
        """Whether all matrices keep as many, so that slices do."""
        return self.least == self.most

    @property
    def first(self) -> int:
        """The start of the window of the matrix that keeps most."""
        return self.near - 2 * self.guard

    @property
    def late(self) -> int:
        """Counts the rows of the window up to the last kept one."""
        if self.uniform:
            return self.most - self.first
        return self.guard if self.near == self.most + self.guard else 2 * self.guard

    def window(self, x: Tensor, width: int) -> Tensor:
        """Returns the first `width` rows of each matrix's window, from x [b, p, …].

        The last row of x stands for rows behind it.
        """
        if self.uniform:
            return x[:, self.first : self.first + width]
        return x.gather(1, self._index(x, width).clamp_max(x.shape[1] - 1))

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Overwrites the first rows of the window of each matrix of x [b, p, …]."""
        if self.uniform:
            x[:, self.first : self.first + rows.shape[1]] = rows
        else:
            x.scatter_(1, self._index(x, rows.shape[1]), rows)

    def at(self, x: Tensor, offset: int) -> Tensor:
        """Returns entry count + offset of each row of x, or the last: [b]."""
        place = (self.count + offset).clamp(0, x.shape[1] - 1)
        return x.gather(1, place[:, None]).squeeze(1)

    def _index(self, x: Tensor, width: int) -> Tensor:
        index = self.start[:, None] + torch.arange(width, device=x.device)
        index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
        return index.expand(*index.shape[:2], *x.shape[2:])


def make_cut(count: Tensor, least: int, most: int, guard: int, d: int) -> Cut:
    """Cuts d vectors behind the first `count` [b] of them; 2 guard ≤ d."""
    end = (count + guard).clamp(2 * guard, d)
    near = min(d, max(2 * guard, most + guard))
    kept = torch.arange(most, device=count.device) < count[:, None]
    return Cut(count, least, most, end - 2 * guard, end, guard, near, kept)


def make_even_cut(stack: Tensor, k: int, guard: int) -> Cut:
    """Cuts behind the first k vectors of every matrix of a stack [b, d, …]."""
    b, d = stack.shape[:2]
    count = torch.full((b,), k, dtype=torch.int64, device=stack.device)
    return make_cut(count, k, k, guard, d)
