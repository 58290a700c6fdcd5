"""GGUF files: the header read and checked here, quantised blocks turned into numbers by `gguf`.

The package's own reader maps the whole file into memory and believes the lengths in its header.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedFormat, input_error
from .safetensors_file import Watch, read_stored
from .shared_file import SharedFile
from .state import FileState

MAGIC = b"GGUF"
# A file beyond these is refused: headers of image models have a few hundred kB.
_HEADER_LIMIT, _COUNT_LIMIT, _ALIGNMENT_LIMIT = 64 << 20, 1 << 20, 1 << 20
_MOST_AXES = 5  # GGML has four, but files of video models have convolutions of five
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
PLAIN = {0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32}
PLAIN |= {27: torch.int64, 28: torch.float64, 30: torch.bfloat16}
"""Types that are numbers as they stand: GGUF's code -> torch's dtype."""
# Where a tool flattened a weight to make its rows divisible, it notes the shape under this key.
_SHAPE_KEY = "comfy.gguf.orig_shape."


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file."""

    dtype: torch.dtype  # of what is read: the stored type, or float32 for a quantised one
    shape: tuple[int, ...]  # of what is read, rows first
    code: int  # GGUF's number of the stored type
    start: int  # first byte, counted from the beginning of the file
    row_bytes: int  # of one stored row
    rows: int  # as stored; `shape` has as many numbers

    @property
    def quantised_as(self) -> str | None:
        """The name of the stored type; None for numbers as they stand."""
        if self.code in PLAIN:
            return None
        return f"GGUF {load_gguf().GGMLQuantizationType(self.code).name}"


class GgufFile:
    """A GGUF file with a checked header; tensors are read singly."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the header.

        Raises:
            UnsupportedFormat: not a GGUF file of a version that is read, its header contradicts
                itself, a quantised type that `gguf` does not know, or `gguf` is not installed.
        """
        self.path = Path(path)
        load_gguf()
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                self.state = FileState.from_status(status)
                header = _HeaderReader(file, self.path)
                self.tensors = _read_tensors(header, status.st_size)
                file.seek(0)
                self.header_digest = hashlib.sha256(file.read(header.position)).hexdigest()
        except OSError as error:
            raise input_error(path, error) from error

    def locate(self, name: str) -> int:
        """Returns the first byte of a tensor, counted from the beginning of the file."""
        return self.tensors[name].start

    def read(self, name: str, watch: Watch | None = None) -> Tensor:
        """Reads the tensor `name`, in memory of its own; `watch` gets its stored bytes.

        Raises:
            KeyError: no such tensor.
            UnsupportedFormat: the file was changed since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        return self._read_stored(name, 0, info.rows, watch).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first axis; nothing else is read or dequantised."""
        info = self.tensors[name]
        if not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"{self.path}: rows {start}:{stop} of {name}, which is {info.shape}")
        if info.rows % info.shape[0]:  # stored rows run across those of the shape
            return self.read(name)[start:stop]
        step = info.rows // info.shape[0]
        return self._read_stored(name, start * step, stop * step).reshape(-1, *info.shape[1:])

    def _read_stored(self, name: str, start: int, stop: int, watch: Watch | None = None) -> Tensor:
        info = self.tensors[name]
        raw = torch.empty(stop - start, info.row_bytes, dtype=torch.uint8, device="cpu")
        first = info.start + start * info.row_bytes
        read_stored(SharedFile(self.path), self, name, first, raw.view(-1).numpy().data)
        if watch is not None:
            watch(raw)
        return raw.view(PLAIN[info.code]) if info.code in PLAIN else dequantise(raw, info.code)


@cache
def load_gguf() -> Any:
    """Imports the `gguf` package.

    Raises:
        UnsupportedFormat: it is not installed.
    """
    try:
        import gguf.quants
    except ImportError as error:
        raise UnsupportedFormat(
            "GGUF files need a package: pip install gguf; or use this model's .safetensors file"
        ) from error
    return gguf


def dequantise(raw: Tensor, code: int) -> Tensor:
    """Turns stored rows [r, bytes] into float32 [r, columns]."""
    package = load_gguf()
    with np.errstate(all="ignore"):  # a damaged scale is found by the check for NaN and Inf
        numbers = package.quants.dequantize(raw.numpy(), package.GGMLQuantizationType(code))
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32))


def _find_block(code: int) -> tuple[int, int] | None:
    """Numbers and bytes of a block; None for a type that cannot be turned into numbers."""
    package = load_gguf()
    try:
        numbers, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType(code)]
        if code not in PLAIN:
            dequantise(torch.zeros(1, size, dtype=torch.uint8), code)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return numbers, size


class _HeaderReader:
    """The beginning of a file, read in pieces and within a limit."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self.path, self.position = file, path, 0
        self._texts = 0

    def refuse(self, why: str) -> UnsupportedFormat:
        return UnsupportedFormat(f"{self.path}: not a GGUF file that can be read: {why}")

    def bytes(self, count: int) -> bytes:
        self.position += count
        if self.position > _HEADER_LIMIT:
            raise self.refuse("its header is larger than any real one")
        content = self._file.read(count)
        if len(content) < count:
            raise self.refuse("it ends inside its header; download it again")
        return content

    def numbers(self, code: str, count: int = 1) -> list[Any]:
        return list(struct.unpack(f"<{count}{code}", self.bytes(count * struct.calcsize(code))))

    def count(self, what: str) -> int:
        (length,) = self.numbers("Q")
        if length > _COUNT_LIMIT:
            raise self.refuse(f"it says that it has {length} {what}")
        return int(length)

    def text(self) -> str:
        self._texts += 1  # an empty one takes eight bytes, and as long as any other
        if self._texts > _COUNT_LIMIT:
            raise self.refuse("it has more texts than any real one")
        (length,) = self.numbers("Q")
        if length > _HEADER_LIMIT:
            raise self.refuse(f"a name of {length} bytes")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self.refuse("a name that is not UTF-8") from error

    def value(self) -> Any:
        """Reads the next value of the metadata: number, string or list."""
        (code,), length = self.numbers("I"), 1
        if is_list := code == _ARRAY:
            (code,), length = self.numbers("I"), self.count("values in a list")
        if code not in (*_SCALARS, _STRING):
            raise self.refuse(f"a value of the unknown type {code}")
        text = code == _STRING
        value = (
            [self.text() for _ in range(length)] if text else self.numbers(_SCALARS[code], length)
        )
        return value if is_list else value[0]


def _read_tensors(header: _HeaderReader, size: int) -> dict[str, GgufTensor]:
    """Reads the entries of all tensors; none may overlap another or end beyond the file."""
    if header.bytes(4) != MAGIC:
        raise header.refuse("it does not begin with GGUF")
    if (version := header.numbers("I")[0]) not in (2, 3):
        raise header.refuse(f"version {version}; versions 2 and 3 are read")
    count, entries = header.count("tensors"), header.count("entries")
    metadata = {header.text(): header.value() for _ in range(entries)}
    listed: dict[str, list[int]] = {}
    for _ in range(count):
        name, (axes,) = header.text(), header.numbers("I")
        if name in listed:
            raise header.refuse(f"{name} occurs twice")
        if not 1 <= axes <= _MOST_AXES:
            raise header.refuse(f"{name} has {axes} axes")
        # The fastest axis first, then the type and the first byte behind the header.
        listed[name] = [*header.numbers("Q", axes), *header.numbers("I"), *header.numbers("Q")]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= _ALIGNMENT_LIMIT:
        raise header.refuse(f"its alignment is {alignment!r:.40}")
    start = -(-header.position // alignment) * alignment
    placed, end, before = {}, 0, ""
    for name, (*axes, code, offset) in listed.items():
        shape = tuple(axes[::-1])
        placed[name] = _place_tensor(name, shape, code, start + offset, metadata, header)
    for name, info in sorted(placed.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise header.refuse(f"{name} overlaps {before}")
        end, before = info.start + info.rows * info.row_bytes, name
        if end > size:
            raise UnsupportedFormat(
                f"{header.path}: cut off: {name} ends at byte {end}, the file at {size}; "
                "download it again"
            )
    return placed


def _place_tensor(
    name: str, shape: tuple[int, ...], code: int, start: int, metadata: Any, header: _HeaderReader
) -> GgufTensor:
    if (block := _find_block(code)) is None:
        raise UnsupportedFormat(
            f"{header.path}: {name} is stored as GGUF type {code}, which the installed gguf cannot "
            "turn into numbers; update gguf or use another quantisation of this model"
        )
    total, columns = math.prod(shape), shape[-1]
    if not 0 < total < 2**48 or columns % block[0] or start >= 2**62:
        raise header.refuse(f"{name} has the impossible shape {list(shape)!r:.80}")
    original = metadata.get(_SHAPE_KEY + name, list(shape))
    whole = isinstance(original, list) and all(type(n) is int and n > 0 for n in original)
    if not whole or len(original) > _MOST_AXES or math.prod(original) != total:
        raise header.refuse(f"{name} was not of shape {original!r:.80}")
    dtype, row_bytes = PLAIN.get(code, torch.float32), columns // block[0] * block[1]
    return GgufTensor(dtype, tuple(original), code, start, row_bytes, total // columns)
