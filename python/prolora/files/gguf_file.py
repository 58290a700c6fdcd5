"""GGUF files: the header read and checked here, quantised blocks turned into numbers by `gguf`.

The package's own reader maps the whole file into memory and believes the lengths in its header, so
it is used for the arithmetic of the quantised types alone.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedFormat, input_error
from .safetensors_file import read_stored
from .state import FileState

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Bytes of header, entries and axes beyond which a file is not believed: real ones of image models
# have a few hundred kB, those of language models a few MB.
_HEADER_LIMIT = 64 << 20
_COUNT_LIMIT = 1 << 20
# GGML has four; files of video models have convolutions of five all the same.
_MOST_AXES = 5
_ALIGNMENT_LIMIT = 1 << 20

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
# Types that are numbers as they stand: GGUF's code -> torch's dtype.
_PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
# Where a tool flattened a weight to make its rows divisible, it notes the shape under this key.
_SHAPE_KEY = "comfy.gguf.orig_shape."


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        dtype: of what is read: the stored type, or float32 for a quantised one.
        shape: of what is read, rows first.
        code: GGUF's number of the stored type.
        start: first byte, counted from the beginning of the file.
        row_bytes: bytes of one stored row.
        stored: rows × columns as stored; `shape` has as many numbers.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    code: int
    start: int
    row_bytes: int
    stored: tuple[int, int]

    @property
    def quantised_as(self) -> str | None:
        """The name of the stored type; None for numbers as they stand."""
        return None if self.code in _PLAIN else f"GGUF {load_quants().name(self.code)}"


class GgufFile:
    """A GGUF file whose header was read and checked; tensors are read one at a time.

    Attributes:
        path: the file.
        tensors: name -> `GgufTensor`, in the order of the header.
        state: of the file, when its header was read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the header.

        Raises:
            UnsupportedFormat: not a GGUF file of a version that is read, its header contradicts
                itself, a quantised type that `gguf` does not know, or `gguf` is not installed.
        """
        self.path = Path(path)
        load_quants()
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                self.state = FileState.from_status(status)
                self.tensors = _read_tensors(_HeaderReader(file, self.path), status.st_size)
        except OSError as error:
            raise input_error(path, error) from error

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own.

        Raises:
            KeyError: no such tensor.
            UnsupportedFormat: the file was changed since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        return self._read_stored(name, 0, info.stored[0]).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first axis; nothing else is read or dequantised."""
        info = self.tensors[name]
        if not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"{self.path}: rows {start}:{stop} of {name}, which is {info.shape}")
        if info.stored[0] % info.shape[0]:  # stored rows run across those of the shape
            return self.read(name)[start:stop]
        step = info.stored[0] // info.shape[0]
        rows = self._read_stored(name, start * step, stop * step)
        return rows.reshape(stop - start, *info.shape[1:])

    def _read_stored(self, name: str, start: int, stop: int) -> Tensor:
        """Stored rows as numbers [stop − start, columns]."""
        info = self.tensors[name]
        raw = torch.empty(stop - start, info.row_bytes, dtype=torch.uint8, device="cpu")
        try:
            with open(self.path, "rb", buffering=0) as file:
                read_stored(file, self, name, info.start + start * info.row_bytes, raw.view(-1))
        except OSError as error:
            raise input_error(self.path, error, f"{name} cannot be read") from error
        if info.code in _PLAIN:
            return raw.view(_PLAIN[info.code])
        return torch.from_numpy(load_quants().dequantize(raw.numpy(), info.code))


class _Quants:
    """The quantised types of the `gguf` package."""

    def __init__(self, package: Any) -> None:
        self._types = package.GGMLQuantizationType
        self._dequantize: Callable[..., Any] = package.quants.dequantize
        self._sizes: dict[Any, tuple[int, int]] = package.GGML_QUANT_SIZES

    def block(self, code: int) -> tuple[int, int] | None:
        """(numbers, bytes) of a block, None for a type that cannot be turned into numbers."""
        try:
            sizes = self._sizes[self._types(code)]
            if code not in _PLAIN:
                self.dequantize(np.zeros((1, sizes[1]), dtype=np.uint8), code)
        except (ValueError, KeyError, NotImplementedError):
            return None
        return sizes

    def name(self, code: int) -> str:
        """A type as people call it."""
        return str(self._types(code).name)

    def dequantize(self, rows: np.ndarray[Any, Any], code: int) -> np.ndarray[Any, Any]:
        """Stored rows [r, bytes] as float32 [r, columns]."""
        with np.errstate(all="ignore"):  # a damaged scale is found by the check for NaN and Inf
            numbers: np.ndarray[Any, Any] = self._dequantize(rows, self._types(code))
        return np.ascontiguousarray(numbers, dtype=np.float32)


@cache
def load_quants() -> _Quants:
    """The `gguf` package.

    Raises:
        UnsupportedFormat: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UnsupportedFormat(
            'GGUF files need the package gguf: pip install "prolora[gguf]"; or use the '
            ".safetensors file of this model"
        ) from error
    return _Quants(gguf)


class _HeaderReader:
    """The beginning of a file, read piece by piece and never beyond a limit."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self.path, self.position = file, path, 0

    def refuse(self, why: str) -> UnsupportedFormat:
        """The error that says what is wrong with the header."""
        return UnsupportedFormat(f"{self.path}: not a GGUF file that can be read: {why}")

    def bytes(self, count: int) -> bytes:
        """The next bytes."""
        self.position += count
        if self.position > _HEADER_LIMIT:
            raise self.refuse("its header is larger than any real one")
        content = self._file.read(count)
        if len(content) < count:
            raise self.refuse("it ends inside its header; download it again")
        return content

    def number(self, code: str) -> Any:
        """The next number of a `struct` code."""
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def count(self, what: str) -> int:
        """The next length, refused where no real file has so many."""
        length = int(self.number("Q"))
        if length > _COUNT_LIMIT:
            raise self.refuse(f"it says that it has {length} {what}")
        return length

    def text(self) -> str:
        """The next string."""
        length = self.number("Q")
        if length > _HEADER_LIMIT:
            raise self.refuse(f"a name of {length} bytes")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self.refuse("a name that is not UTF-8") from error

    def value(self) -> Any:
        """The next value of the metadata: number, string or list."""
        code = self.number("I")
        if code != _ARRAY:
            return self._scalar(code)
        code, length = self.number("I"), self.count("values in a list")
        if code not in _SCALARS:
            if code != _STRING:
                raise self.refuse(f"a list of values of the unknown type {code}")
            return [self.text() for _ in range(length)]
        size = struct.calcsize("<" + _SCALARS[code])
        return list(struct.unpack(f"<{length}{_SCALARS[code]}", self.bytes(length * size)))

    def _scalar(self, code: int) -> Any:
        if code == _STRING:
            return self.text()
        if code not in _SCALARS:
            raise self.refuse(f"a value of the unknown type {code}")
        return self.number(_SCALARS[code])


def _read_tensors(header: _HeaderReader, size: int) -> dict[str, GgufTensor]:
    """The tensors of a file of `size` bytes."""
    if header.bytes(4) != MAGIC:
        raise header.refuse("it does not begin with GGUF")
    version = header.number("I")
    if version not in _VERSIONS:
        raise header.refuse(f"version {version}; versions 2 and 3 are read")
    tensors, entries = header.count("tensors"), header.count("entries")
    metadata = {header.text(): header.value() for _ in range(entries)}
    listed: dict[str, _HeaderEntry] = {}
    for _ in range(tensors):
        name, axes = header.text(), header.number("I")
        if name in listed:
            raise header.refuse(f"{name} occurs twice")
        if not 1 <= axes <= _MOST_AXES:
            raise header.refuse(f"{name} has {axes} axes")
        shape = tuple(int(header.number("Q")) for _ in range(axes))[::-1]  # fastest axis first
        listed[name] = _HeaderEntry(shape, int(header.number("I")), int(header.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= _ALIGNMENT_LIMIT:
        raise header.refuse(f"its alignment is {alignment!r:.40}")
    start = -(-header.position // alignment) * alignment
    placed = {
        name: _place_tensor(name, entry, start, metadata, header) for name, entry in listed.items()
    }
    _check_extent(placed, size, header)
    return placed


class _HeaderEntry(NamedTuple):
    """What the header says of a tensor: shape, rows first; type; first byte of the data."""

    shape: tuple[int, ...]
    code: int
    offset: int


def _place_tensor(
    name: str, entry: _HeaderEntry, start: int, metadata: dict[str, Any], header: _HeaderReader
) -> GgufTensor:
    """One tensor, its size known from its type and shape.

    Args:
        name: in the header.
        entry: what the header says of it.
        start: first byte of the data in the file.
        metadata: of the file; the shape before a tool flattened the tensor may stand there.
        header: for messages.
    """
    shape, code, offset = entry
    block = load_quants().block(code)
    if block is None:
        raise UnsupportedFormat(
            f"{header.path}: {name} is stored as GGUF type {code}, which the installed gguf cannot "
            "turn into numbers; update gguf or use another quantisation of this model"
        )
    total = math.prod(shape)
    if not 0 < total < 2**48 or shape[-1] % block[0] or offset >= 2**62:
        raise header.refuse(f"{name} has the impossible shape {list(shape)!r:.80}")
    rows, columns = total // shape[-1], shape[-1]
    original = metadata.get(_SHAPE_KEY + name)
    if original is not None:
        whole = isinstance(original, list) and all(type(n) is int and n > 0 for n in original)
        if not whole or len(original) > _MOST_AXES or math.prod(original) != total:
            raise header.refuse(f"{name} was not of shape {original!r:.80}")
        shape = tuple(original)
    dtype = _PLAIN.get(code, torch.float32)
    row_bytes = columns // block[0] * block[1]
    return GgufTensor(dtype, shape, code, start + offset, row_bytes, (rows, columns))


def _check_extent(tensors: dict[str, GgufTensor], size: int, header: _HeaderReader) -> None:
    """No tensor may overlap another or end beyond the file."""
    end, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise header.refuse(f"{name} overlaps {before}")
        end, before = info.start + info.stored[0] * info.row_bytes, name
        if end > size:
            raise UnsupportedFormat(
                f"{header.path}: cut off: {name} ends at byte {end}, the file at {size}; "
                "download it again"
            )
