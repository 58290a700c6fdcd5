"""Weights that have not been read yet, and views of them: rows, swapped halves, scaled values."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ..files.gguf_file import GgufFile
from ..files.safetensors_file import SafetensorsFile


@dataclass(frozen=True)
class Origin:
    """What a weight is read from: equal origins have equal values."""

    text: str  # files with their states, key, and what is done to what is read
    changed: int  # when the youngest of the files was last changed, in ns since 1970

    def then(self, what: str) -> Origin:
        """Returns the origin of a computation's result."""
        return Origin(f"{self.text} {what}", self.changed)


class Weight(Protocol):
    """One weight that has not been read yet; what is read is `dtype` of `shape`."""

    @property
    def origin(self) -> Origin | None:
        """Where its values come from; None if they are in memory, where they may change."""

    @property
    def name(self) -> str:
        """Where it lies, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first, as torch stores it."""

    @property
    def dtype(self) -> torch.dtype:
        """As stored, or float32 where stored numbers mean something only after a computation."""

    def read(self) -> Tensor:
        """Reads the tensor [*shape]."""

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of it; nothing else is read."""


TensorFile: TypeAlias = SafetensorsFile | GgufFile
"""A file of tensors whose header was read and checked."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a file."""

    file: TensorFile
    key: str

    @property
    def origin(self) -> Origin:
        """The file as it was when it was opened, and the key."""
        # Without the file system's number, which changes at every start of a machine.
        state = " ".join(map(str, self.file.state[1:]))
        path = os.path.abspath(self.file.path)
        return Origin(f"{path} {state} {self.key}", max(self.file.state[-2:]))

    @property
    def name(self) -> str:
        """As "file.safetensors:key"."""
        return f"{self.file.path.name}:{self.key}"

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.file.tensors[self.key].shape

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.file.tensors[self.key].dtype

    def read(self) -> Tensor:
        """Reads the tensor from the file, every time."""
        return self.file.read(self.key)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Reads some rows from the file, every time."""
        return self.file.read_rows(self.key, start, stop)


@dataclass(frozen=True, eq=False)
class LoadedWeight:
    """A weight that is already in memory."""

    tensor: Tensor
    name: str

    @property
    def origin(self) -> None:
        """None: whoever has the tensor may write into it."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As it is."""
        return self.tensor.dtype

    def read(self) -> Tensor:
        """Returns the caller's own tensor, not a copy."""
        return self.tensor

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Returns a view of the caller's own tensor."""
        return self.tensor[start:stop]


@dataclass(frozen=True)
class RowsWeight:
    """Rows [start, stop) of a matrix that several layers were fused into."""

    matrix: Weight
    start: int
    stop: int

    @property
    def origin(self) -> Origin | None:
        """The fused matrix and the rows."""
        origin = self.matrix.origin
        return origin and origin.then(f"rows {self.start} {self.stop}")

    @property
    def name(self) -> str:
        """The fused matrix and the rows of it."""
        return f"{self.matrix.name}[{self.start}:{self.stop}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows."""
        return (self.stop - self.start, *self.matrix.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of the fused matrix."""
        return self.matrix.dtype

    def read(self) -> Tensor:
        """Reads these rows alone."""
        return self.matrix.read_rows(self.start, self.stop)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Reads some of these rows."""
        return self.matrix.read_rows(self.start + start, self.start + stop)


def join_origins(weights: Sequence[Weight], how: str) -> Origin | None:
    """Joins the origins of several weights; None if one is in memory.

    `how` is a word between them.
    """
    origins = [weight.origin for weight in weights]
    known = [origin for origin in origins if origin is not None]
    if not known or len(known) < len(origins):
        return None
    text = f" {how} ".join(origin.text for origin in known)
    return Origin(text, max(origin.changed for origin in known))


class DerivedWeight(ABC):
    """A weight computed from stored ones, with its own name and dtype."""

    stored: Weight

    @property
    def name(self) -> str:
        """Of the stored weight."""
        return self.stored.name

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weight."""
        return self.stored.dtype

    @abstractmethod
    def read(self) -> Tensor:
        """Computes all numbers [*shape]."""

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows of what `read` gives."""
        return self.read()[start:stop]


@dataclass(frozen=True)
class ConvertedWeight(DerivedWeight):
    """A weight stored with its halves in the other order, or transposed."""

    stored: Weight  # as the file has it
    # Stored as [in, out]; otherwise its upper and lower half are exchanged
    transposed: bool = False

    @property
    def origin(self) -> Origin | None:
        """The stored weight, and what is done to it."""
        stored = self.stored.origin
        return stored and stored.then("transposed" if self.transposed else "halves exchanged")

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is read."""
        return self.stored.shape[::-1] if self.transposed else self.stored.shape

    def read(self) -> Tensor:
        """Reads the weight in the canonical order."""
        if self.transposed:
            return self.stored.read().mT.contiguous()
        half = self.shape[0] // 2
        rows = self.stored.read_rows
        # Through bytes: torch cannot concatenate every float8 type.
        parts = [rows(half, 2 * half), rows(0, half)]
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts]).view(self.dtype)
