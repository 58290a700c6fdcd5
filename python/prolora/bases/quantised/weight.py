"""Weights stored as codes with scales."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...errors import UnsupportedFormat
from ...files.gguf_file import GgufFile
from ..weights import ConvertedWeight, DerivedWeight, RowsWeight, StoredWeight, Weight
from .codes import read_floats

# Numbers decoded at a time: 16 MiB of float32, and a few times that beside the result.
_CHUNK = 1 << 22


READING = 1
"""Goes up where a kind is read as other numbers than before, for what is cached of them."""
_PARTS = ("stored", "scales")


@dataclass(frozen=True)
class QuantisedWeight(DerivedWeight):
    """Codes and scales of float32 numbers, decoded some rows at a time."""

    kind: str  # how it is quantised, for people
    stored: Weight  # the codes
    scales: tuple[Weight, ...]  # whatever else its numbers follow from
    shape: tuple[int, ...]  # rows first, as it is read

    @property
    def parts(self) -> tuple[StoredWeight, ...]:
        """Codes and scales."""
        return tuple(part for one in (self.stored, *self.scales) for part in one.parts)

    @property
    def content(self) -> str:
        """All of its parts, and how numbers are made of them."""
        parts = " times ".join(one.content for one in (self.stored, *self.scales))
        # Notes may lie in another file than the codes.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        texts = [repr(x) for name, x in values.items() if name not in _PARTS and not callable(x)]
        return f"{parts} {READING} {' '.join(texts)}"

    @property
    def dtype(self) -> torch.dtype:
        """float32: the product has more digits than either factor."""
        return torch.float32

    def read(self) -> Tensor:
        """Reads all numbers [*shape]."""
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Reads rows [start, stop), and no other codes.

        Raises:
            UnsupportedFormat: a scale is not finite, or cannot be one.
        """
        scales = self.load_scales()
        numbers = torch.empty(stop - start, *self.shape[1:])
        step = max(1, _CHUNK // max(1, math.prod(self.shape[1:])))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            decoded = self.decode(first, last, scales)
            numbers[first - start : last - start] = decoded.reshape(-1, *self.shape[1:])
        return numbers

    @abstractmethod
    def load_scales(self) -> tuple[Tensor, ...]:
        """Reads the scales in the form that `decode` takes."""

    @abstractmethod
    def decode(self, start: int, stop: int, scales: tuple[Tensor, ...]) -> Tensor:
        """Rows [start, stop) as float32, of any shape with as many numbers."""

    def read_scale(self, scale: Weight, *, zero: bool = True) -> Tensor:
        """Reads a scale as float32; refuses one that is not finite.

        `zero` allows zeros, which a block of zeros has.

        Raises:
            UnsupportedFormat: names both the scale and the weight.
        """
        numbers = scale.read().to(torch.float32)
        self.check_scale(numbers, scale, zero=zero)
        return numbers

    def check_scale(self, numbers: Tensor, scale: Weight, *, zero: bool = True) -> None:
        """Refuses numbers of a scale that are not finite; see `read_scale`."""
        if not bool((numbers.isfinite() & (zero | (numbers != 0))).all()):
            raise UnsupportedFormat(
                f"{scale.name}: the scale of {self.stored.name} is "
                f"{'' if zero else 'zero or '}not finite; the checkpoint is damaged"
            )


@dataclass(frozen=True)
class ScaledWeight(QuantisedWeight):
    """A weight (q - zero) · scale + shift; tiles share the three.

    q is a matrix [m, n].
    """

    tile: tuple[int, int] = (1, 1)  # rows and columns of a tile
    unpack: Callable[[Tensor], Tensor] = read_floats  # makes numbers of the stored rows
    divisor: float = 1.0  # the scales are stored in multiples of it

    def load_scales(self) -> tuple[Tensor, ...]:
        """Reads scale, zero and shift of each tile [m/rows, n/columns]; absent ones are empty."""
        scale = self.read_scale(self.scales[0], zero=self.scales[0].shape not in ((), (1,)))
        tiles = (scale / self.divisor).reshape(-(-self.shape[0] // self.tile[0]), -1)
        return tiles, torch.empty(0), torch.empty(0)

    def decode(self, start: int, stop: int, scales: tuple[Tensor, ...]) -> Tensor:
        """Decodes the numbers, tile by tile [rows, n/columns, columns]."""
        numbers: Tensor = self.unpack(self.stored.read_rows(start, stop).reshape(stop - start, -1))
        numbers = numbers.unflatten(1, (-1, self.tile[1]))
        tiles = torch.arange(start, stop) // self.tile[0]
        scale, zero, shift = scales[:3]
        if len(zero):
            numbers.sub_(zero[tiles, :, None])
        numbers.mul_(scale[tiles, :, None])
        return numbers.add_(shift[tiles, :, None]) if len(shift) else numbers


def scale_rows(kind: str, stored: Weight, scale: Weight, divisor: float = 1.0) -> ScaledWeight:
    """Builds the weight of codes q [m, ...] with one scale, or m."""
    rows = 1 if math.prod(scale.shape) == stored.shape[0] else stored.shape[0]
    tile = rows, math.prod(stored.shape[1:])
    return ScaledWeight(kind, stored, (scale,), stored.shape, tile, divisor=divisor)


def find_kind(weight: Weight) -> str | None:
    """Returns how a weight is quantised; None if it stores its own numbers."""
    weight = look_inside(weight)
    if isinstance(weight, QuantisedWeight):
        return weight.kind
    if isinstance(weight, StoredWeight) and isinstance(weight.file, GgufFile):
        return weight.file.tensors[weight.key].quantised_as
    return "float8 without scales" if weight.dtype.itemsize == 1 else None


def look_inside(weight: Weight) -> Weight:
    """Returns what a view is a view of, else the weight itself."""
    while isinstance(weight, RowsWeight | ConvertedWeight):
        weight = weight.matrix if isinstance(weight, RowsWeight) else weight.stored
    return weight
