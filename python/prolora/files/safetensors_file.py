"""safetensors files, read only after the whole header was checked.

Reading uses plain file reads and never a memory map: mapped pages count as resident memory, and a
tool that walks through a 5 GB checkpoint one weight at a time should need the room of one weight.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedFormat, input_error
from .jsontext import LFS_POINTER
from .state import FileState, check_unchanged

StrPath = str | os.PathLike[str]
Tensors = Mapping[str, Tensor]
Metadata = Mapping[str, str]

# Both are checked before anything of that size is allocated. The safetensors library calls longer
# headers than the first no safetensors file. The second is what is read here: text made to harm
# takes 25 times its length once it is parsed, and a header of 100,000 tensors has 15 MB.
_LONGEST_HEADER = 100_000_000
_HEADER_LIMIT = 32 << 20
# Characters of a tensor's name; those of real files have 200 at most. Messages quote names.
_LONGEST_NAME = 4096

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# rar, 7z, gzip and xz, which people download; a zip file is looked into.
_ARCHIVES = (b"Rar!", b"7z\xbc\xaf", b"\x1f\x8b", b"\xfd7zXZ")
# Bytes in which a zip file names its first entry.
_NAME_BYTES = 512

_CONVERT_PICKLE = (
    "import sys, torch, safetensors.torch as s; "
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "d = d.get('state_dict', d); "
    "s.save_file({k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
    "sys.argv[2])"
)


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header; `start` and `stop` are bytes counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file whose header was read and checked; tensors are read one at a time.

    Attributes:
        path: the file.
        metadata: the header's `__metadata__`, {} if there is none.
        tensors: name -> `TensorInfo`, in header order.
        data_start: the byte at which the tensors begin.
        state: of the file, when its header was read.
    """

    def __init__(self, path: StrPath) -> None:
        """Reads the header.

        Raises:
            UnsupportedFormat: the file is missing, unreadable, cut off, not a safetensors file, or
                its header contradicts itself.
        """
        self.path = Path(path)
        with self._open() as file:
            try:
                status = os.fstat(file.fileno())
                raw = _read_header(file, self.path, status.st_size)
            except OSError as error:
                raise input_error(self.path, error) from error
        self.state = FileState.from_status(status)
        self.data_start = 8 + len(raw)
        self.metadata, self.tensors = _parse_header(raw, self.path)
        _check_extent(self.tensors, self.path, status.st_size - self.data_start)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in its storage dtype, on the CPU, in memory of its own.

        Raises:
            KeyError: no such tensor.
            UnsupportedFormat: the file was changed since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        return self._read(name, info.dtype, info.shape, info.start)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first axis of `name`; nothing else is read.

        Raises:
            KeyError: no such tensor.
            IndexError: not 0 <= start <= stop <= rows, or the tensor is a scalar.
            UnsupportedFormat: the file was changed since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"{self.path}: rows {start}:{stop} of {name}, which is {info.shape}")
        row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
        shape = (stop - start, *info.shape[1:])
        return self._read(name, info.dtype, shape, info.start + start * row_bytes)

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor, as views of one buffer that is read at once.

        Raises:
            UnsupportedFormat: the file was changed since it was opened, or cannot be read.
        """
        size = max((info.stop for info in self.tensors.values()), default=0)
        buffer = self._read("its data", torch.uint8, (size,), 0)
        return {name: _cut_tensor(buffer, info) for name, info in self.tensors.items()}

    def _open(self) -> FileIO:
        """The open file, unbuffered: reads go straight into the tensor's own memory."""
        try:
            if stat.S_ISREG(os.stat(self.path).st_mode):  # a pipe or a device would block
                return open(self.path, "rb", buffering=0)
        except (OSError, ValueError) as error:
            raise input_error(self.path, error) from error
        raise UnsupportedFormat(f"{self.path}: not a file; a .safetensors file is needed")

    def _read(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Tensor:
        """`shape` elements of `dtype` from byte `start` of the data."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        with self._open() as file:
            read_stored(file, self, name, self.data_start + start, buffer)
        return view_numbers(buffer, dtype).reshape(shape)


def _cut_tensor(buffer: Tensor, info: TensorInfo) -> Tensor:
    """One tensor out of the data of a file [bytes]; a copy where it is not aligned."""
    flat = buffer[info.start : info.stop]
    if info.start % info.dtype.itemsize:
        flat = flat.clone()
    return view_numbers(flat, info.dtype).view(info.shape)


class _OpenedFile(Protocol):
    """A file whose header was read."""

    path: Path
    state: FileState


def read_stored(
    file: FileIO | BufferedReader, opened: _OpenedFile, name: str, start: int, buffer: Tensor
) -> None:
    """Fills a buffer [bytes] with those of a tensor, which begin at `start` of the open file.

    Raises:
        UnsupportedFormat: the file was changed since `opened`, ends inside or cannot be read.
    """
    check_unchanged(opened.path, opened.state, file.fileno())
    try:
        file.seek(start)
        complete = fill_buffer(file, buffer.numpy().data)
    except OSError as error:
        raise input_error(opened.path, error, f"{name} cannot be read") from error
    if not complete:
        raise UnsupportedFormat(f"{opened.path}: ends inside {name}; run again")


def view_numbers(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as the numbers that they are."""
    # Any byte but 0 and 1 in a torch.bool is undefined behaviour.
    return buffer.ne(0) if dtype == torch.bool else buffer.view(dtype)


def fill_buffer(file: FileIO | BufferedReader, view: memoryview) -> bool:
    """Reads until `view` is full; one read call is free to return less. False: the file ended."""
    while view:
        count = file.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def _read_header(file: FileIO, path: Path, size: int) -> bytes:
    """The JSON text of the header, its length checked before it is read."""
    head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    # Only the whole start tells: a header of 128 bytes begins with the 0x80 of a pickle.
    if len(head) < 9 or head[8:] != b"{" or length > _LONGEST_HEADER:
        _refuse_other_formats(head + file.read(_NAME_BYTES), path)
    if length > _HEADER_LIMIT:
        raise UnsupportedFormat(
            f"{path}: its header has {length} bytes, more than any real one; if that is metadata, "
            "save the file without it"
        )
    if 8 + length > size:
        raise UnsupportedFormat(
            f"{path}: cut off inside its header ({size} bytes of at least {8 + length}); "
            "download it again"
        )
    raw = bytearray(length)
    file.seek(8)
    if not fill_buffer(file, memoryview(raw)):
        raise UnsupportedFormat(f"{path}: ends inside its header; run again")
    return bytes(raw)


def _refuse_other_formats(head: bytes, path: Path) -> NoReturn:
    """Says what a file is that does not start like a safetensors file.

    Args:
        head: its beginning.
        path: of the file.
    """
    # PyTorch's pickles are zip files whose first entry is the pickle.
    is_zip, is_torch = head.startswith(b"PK"), b"/data.pkl" in head
    if head.startswith(_ARCHIVES) or (is_zip and not is_torch):
        raise UnsupportedFormat(
            f"{path}: an archive; unpack it, and give the .safetensors file in it"
        )
    if is_zip:
        raise _refuse_pickle(path, "")
    if head.startswith((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        raise _refuse_pickle(path, " in the old format")
    if path.suffix.lower() == ".onnx":
        raise UnsupportedFormat(
            f"{path}: an ONNX file, which is not read; give the checkpoint it was exported from"
        )
    if head.startswith(b"GGUF"):
        raise UnsupportedFormat(
            f"{path}: a GGUF file; base models are read from GGUF, LoRAs are not: use the "
            ".safetensors file"
        )
    if head.startswith(b"version "):
        raise UnsupportedFormat(f"{path}: {LFS_POINTER}")
    if head.lower().startswith((b"<!doc", b"<html", b"<?xml")):
        raise UnsupportedFormat(
            f"{path}: a web page, not a model: the download link asked for a login or an "
            "agreement; open the link in a browser, and download the file itself"
        )
    if not head:
        raise UnsupportedFormat(f"{path}: empty file; download it again")
    way_out = "" if path.suffix == ".safetensors" else "; give the .safetensors file beside it"
    raise UnsupportedFormat(f"{path}: not a safetensors file{way_out}")


def _refuse_pickle(path: Path, kind: str) -> UnsupportedFormat:
    """The error of a pickle, with the command that converts it."""
    converted = path.with_suffix(".safetensors")
    if converted == path:  # a pickle that was merely renamed
        converted = path.with_suffix(".converted.safetensors")
    command = f'python -c "{_CONVERT_PICKLE}" {_quote(str(path))} {_quote(str(converted))}'
    error = UnsupportedFormat(
        f"{path}: a pickle checkpoint{kind}; it can run code when it is loaded, so it is not read. "
        f"Convert it once:\n{command}"
    )
    error.command = command
    return error


def _quote(word: str) -> str:
    """A word of a command line: in double quotes, which cmd.exe knows, too, where they suffice."""
    if re.fullmatch(r"[\w./:\\+@%-]+", word) and (os.name == "nt" or "\\" not in word):
        return word
    return shlex.quote(word) if re.search(r'["$`\\!]', word) and os.name != "nt" else f'"{word}"'


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; two entries of one name would hide one of them."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _parse_header(raw: bytes, path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """(metadata, tensors) of a header's JSON text."""
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_refuse_duplicates)
        if b"\\u" in raw:  # an escape can spell half a character, which nothing can print or save
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UnsupportedFormat(f"{path}: its header is damaged: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UnsupportedFormat(f"{path}: its metadata is not text")
    return metadata, {name: _parse_entry(name, entry, path) for name, entry in header.items()}


def _parse_entry(name: str, entry: object, path: Path) -> TensorInfo:
    """One tensor of a header, its size checked against its dtype and shape."""
    if len(name) > _LONGEST_NAME:
        raise UnsupportedFormat(
            f"{path}: {name[:80]!r}… is a name of {len(name)} characters, more than any real one"
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UnsupportedFormat(f"{path}: its header is damaged at {name}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise UnsupportedFormat(f"{path}: {name} has the unknown dtype {entry['dtype']!r:.40}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape, 16) or not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise UnsupportedFormat(f"{path}: its header is damaged at {name}")
    start, stop = offsets
    # Beside a 0, torch still multiplies the other sizes: 0 x 2^40 x 2^40 overflows its strides.
    if math.prod(max(size, 1) for size in shape) >= 2**48:
        raise UnsupportedFormat(f"{path}: {name} has an impossible shape")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise UnsupportedFormat(
            f"{path}: {name}: bytes {start} to {stop} do not fit {entry['dtype']} of shape "
            f"{shape!r:.80}"
        )
    return TensorInfo(dtype, tuple(shape), start, stop)


def _are_sizes(values: object, most: int) -> bool:
    """A list of at most `most` whole numbers; 2^48 is beyond any file (True is no number here)."""
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(v) is int and 0 <= v < 2**48 for v in values)


def _check_extent(tensors: dict[str, TensorInfo], path: Path, size: int) -> None:
    """The tensors must tile the `size` bytes after the header: no overlap, no hole, no excess."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            what = "overlaps what is" if info.start < end else "leaves a hole"
            raise UnsupportedFormat(f"{path}: its header is damaged: {name} {what} before it")
        if info.stop > size:
            raise UnsupportedFormat(
                f"{path}: cut off: {name} ends at byte {info.stop} of the data, the file at "
                f"{size}; download it again"
            )
        end = info.stop
    if end < size:
        raise UnsupportedFormat(f"{path}: {size - end} unknown bytes after the last tensor")
