"""Sequences whose items are computed, or read from files, on access."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """A sequence without stored items; a subclass gives its length and one item at a time."""

    @abstractmethod
    def item(self, i: int) -> T:
        """Returns item i, 0 ≤ i < len(self)."""

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        """Returns item i, or several."""
        if isinstance(i, slice):
            return [self.item(k) for k in range(*i.indices(len(self)))]
        index = i + len(self) if i < 0 else i
        if not 0 <= index < len(self):
            raise IndexError(i)
        return self.item(index)


class SampleSelection(LazySequence[T]):
    """Some items of another sequence."""

    def __init__(self, items: Sequence[T], rows: Sequence[int]) -> None:
        """Takes the sequence, and the positions of the items."""
        self.items, self.rows = items, rows

    def __len__(self) -> int:
        """Returns the number of items."""
        return len(self.rows)

    def item(self, i: int) -> T:
        """Returns the selected item i."""
        return self.items[self.rows[i]]
