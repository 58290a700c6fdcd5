"""Weights that have not been read yet, and views of them: rows, swapped halves, scaled values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core.arrays import MatrixLike, to_tensor
from ..core.validation import check_layout, check_operand
from ..errors import ShapeMismatch, UnsupportedFormat
from ..files.hashing import hash_parts
from .leaves import Leaves, TensorFile


class Weight(Protocol):
    """One weight that has not been read yet; what is read is `dtype` of `shape`."""

    @property
    def parts(self) -> tuple[StoredWeight, ...]:
        """The tensors in files that it is computed from; none if it is in memory."""

    @property
    def content(self) -> str:
        """What its values follow from: digests of its parts, and what is done to them."""

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


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a file."""

    leaves: Leaves
    key: str

    @property
    def file(self) -> TensorFile:
        """The open file that holds it."""
        return self.leaves.file

    @property
    def parts(self) -> tuple[StoredWeight]:
        """Itself."""
        return (self,)

    @property
    def content(self) -> str:
        """The digest of its bytes, with dtype and shape."""
        self.leaves.note(self.key)
        return f"{self.leaves.digest(self.key)} {self.dtype} {self.shape}"

    @property
    def name(self) -> str:
        """As "file.safetensors:key"."""
        return f"{self.file.path.name}:{self.key}"

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.leaves.file.tensors[self.key].shape

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.leaves.file.tensors[self.key].dtype

    def read(self) -> Tensor:
        """Reads the tensor from the file, every time."""
        return self.leaves.read(self.key)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Reads some rows from the file, every time."""
        self.leaves.note(self.key)
        return self.file.read_rows(self.key, start, stop)


class UnfiledWeight:
    """A weight that is in no file."""

    @property
    def parts(self) -> tuple[StoredWeight, ...]:
        """None."""
        return ()

    @property
    def content(self: Weight) -> str:
        """Its bytes as they are now; whoever has them may write into them."""
        return f"{hash_parts([self.read()])} {self.dtype} {self.shape}"

    def read_rows(self: Weight, start: int, stop: int) -> Tensor:
        """Returns rows of what `read` returns."""
        return self.read()[start:stop]


@dataclass(frozen=True, eq=False)
class LoadedWeight(UnfiledWeight):
    """A weight that is already in memory."""

    tensor: Tensor
    name: str

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


@dataclass(frozen=True, eq=False)
class RequestedWeight(UnfiledWeight):
    """A weight that its owner returns when it is requested."""

    key: str  # the owner's own name of it
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    request: Callable[[str], MatrixLike] | None  # None: it has no values

    def read(self) -> Tensor:
        """Requests the tensor, every time.

        Raises:
            UnsupportedFormat: it has no values.
            ShapeMismatch: it is of another shape than was promised.
            UnsupportedTensor: it is sparse, quantised, complex, of integers or on the meta device.
        """
        if self.request is None:
            raise UnsupportedFormat(
                f"{self.name}: has a shape and no values (it is on the meta device); give what "
                "returns a tensor by its name: open_base(names_and_shapes, read=…)"
            )
        tensor = to_tensor(self.request(self.key), self.name).detach()
        check_layout(self.name, tensor)
        if tuple(tensor.shape) != self.shape:
            raise ShapeMismatch(
                f"{self.name}: `read` returned {list(tensor.shape)}, not {list(self.shape)}"
            )
        if self.dtype.is_floating_point:
            check_operand(self.name, tensor)
        return tensor.to(self.dtype)


@dataclass(frozen=True)
class RowsWeight:
    """Rows [start, stop) of a matrix that several layers were fused into."""

    matrix: Weight
    start: int
    stop: int

    @property
    def parts(self) -> tuple[StoredWeight, ...]:
        """The whole matrix."""
        return self.matrix.parts

    @property
    def content(self) -> str:
        """The fused matrix and the rows."""
        return f"{self.matrix.content} rows {self.start} {self.stop}"

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


class DerivedWeight(ABC):
    """A weight computed from stored ones, with its own name and dtype."""

    stored: Weight

    @property
    def parts(self) -> tuple[StoredWeight, ...]:
        """Of the stored weight."""
        return self.stored.parts

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
        """Returns rows of what `read` returns."""
        return self.read()[start:stop]


@dataclass(frozen=True)
class ConvertedWeight(DerivedWeight):
    """A weight stored with its halves in the other order, or transposed."""

    stored: Weight  # as the file has it
    # Stored as [in, out]; otherwise its upper and lower half are exchanged
    transposed: bool = False

    @property
    def content(self) -> str:
        """The stored weight, and what is done to it."""
        how = "transposed" if self.transposed else "halves exchanged"
        return f"{self.stored.content} {how}"

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
