"""safetensors files, read only after the whole header was checked.

Reading uses plain file reads and never a memory map: mapped pages count as resident memory, and a
tool that walks through a 5 GB checkpoint one weight at a time should need the room of one weight.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from ..errors import UnsupportedFormat, input_error, join_words
from .dtypes import CODES, SIZES, find_torch_dtype, is_floating
from .jsontext import LFS_POINTER
from .shared_file import SharedFile
from .state import FileState, check_unchanged

if TYPE_CHECKING:  # headers are read without torch, which takes seconds to import
    import torch
    from torch import Tensor

StrPath = str | os.PathLike[str]
Watch = Callable[["Tensor"], object]  # gets the stored bytes [n] of a tensor that is read

# Both are checked before anything of that size is allocated. To the safetensors library, longer
# headers than the first are no safetensors file. The second is the limit here: text made to harm
# takes 25 times its length once it is parsed, and a header of 100,000 tensors has 15 MB.
_LONGEST_HEADER = 100_000_000
_HEADER_LIMIT = 32 << 20
# Characters of a tensor's name; those of real files have 200 at most. Messages quote names.
_LONGEST_NAME = 4096
_FIELDS = {"dtype", "shape", "data_offsets"}  # of a tensor in a header

# rar, 7z, gzip and xz, which people download; a zip file is opened.
_ARCHIVES = (b"Rar!", b"7z\xbc\xaf", b"\x1f\x8b", b"\xfd7zXZ")
_UNSIGNED = bytes(byte & 0x7F for byte in range(256))
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
    """An entry of a header: dtype by its name there, bytes counted from the header's end."""

    stored: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """Torch's."""
        return find_torch_dtype(self.stored)


class SafetensorsFile:
    """A safetensors file with a checked header; tensors are read singly.

    Attributes:
        path: the file.
        metadata: the header's `__metadata__`, {} without one.
        tensors: name -> `TensorInfo`, in header order.
        data_start: the byte at which the tensors begin.
        state: of the file, when its header was read.
        header_digest: SHA-256 of the header.
    """

    def __init__(self, path: StrPath, *, keep_open: bool = False) -> None:
        """Reads the header.

        Args:
            path: the file.
            keep_open: reads everything through one open file, until `close`; threads and forked
                processes may share it.

        Raises:
            UnsupportedFormat: the file is missing, unreadable, cut off, not a safetensors file, or
                its header contradicts itself.
        """
        self.path = Path(path)
        file = SharedFile(self.path)
        self._kept = file if keep_open else None
        try:
            status = file.status()
            raw = _read_header(file, self.path, status.st_size)
            self.metadata, self.tensors = _parse_header(raw, self.path)
            self.data_start = 8 + len(raw)
            _check_extent(self.tensors, self.path, status.st_size - self.data_start)
        except BaseException as error:
            file.close()  # or it is open as long as its error: Windows does not replace it then
            if isinstance(error, OSError):
                raise input_error(self.path, error) from error
            raise
        self.state = FileState.from_status(status)
        self.header_digest = hashlib.sha256(raw).hexdigest()

    def locate(self, name: str) -> int:
        """Returns the first byte of a tensor, counted from the beginning of the file."""
        return self.data_start + self.tensors[name].start

    def read(self, name: str, watch: Watch | None = None) -> Tensor:
        """Reads the tensor `name` in its storage dtype; `watch` gets its stored bytes.

        Raises:
            KeyError: no such tensor.
            UnsupportedFormat: the file was changed since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        return self._read(name, info.stored, info.shape, info.start, watch)

    def read_number(self, name: str) -> float:
        """Reads a tensor of one real number, without torch."""
        info = self.tensors[name]
        if info.stored not in (*CODES, "BF16"):
            return float(self.read(name).double())
        raw = bytearray(SIZES[info.stored])
        read_stored(self._open(), self, name, self.data_start + info.start, memoryview(raw))
        whole = b"\0\0" + raw if info.stored == "BF16" else raw  # the upper half of a float32
        return float(struct.unpack(f"<{CODES.get(info.stored, 'f')}", whole)[0])

    def is_zero(self, name: str) -> bool:
        """Returns whether a tensor holds nothing but zeros, without torch.

        Reading stops at the first other number.

        Raises:
            KeyError: no such tensor.
            UnsupportedFormat: the file was changed since it was opened, or cannot be read.
        """
        info, file, step = self.tensors[name], self._open(), 1 << 12
        start = info.start
        while start < info.stop:
            raw = bytearray(min(step, info.stop - start))
            read_stored(file, self, name, self.data_start + start, memoryview(raw))
            if is_floating(info.stored):  # the last byte of a number has its sign: -0.0 is zero
                size = SIZES[info.stored]
                raw[size - 1 :: size] = raw[size - 1 :: size].translate(_UNSIGNED)
            if raw.count(0) < len(raw):
                return False
            start, step = start + len(raw), 1 << 20
        return True

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
        row_bytes = math.prod(info.shape[1:]) * SIZES[info.stored]
        shape = (stop - start, *info.shape[1:])
        return self._read(name, info.stored, shape, info.start + start * row_bytes)

    def read_all(self) -> dict[str, Tensor]:
        """Reads every tensor at once, as views of one buffer.

        Raises:
            UnsupportedFormat: the file was changed since it was opened, or cannot be read.
        """
        size = max((info.stop for info in self.tensors.values()), default=0)
        buffer = self._read("its data", "U8", (size,), 0)
        tensors = {}
        for name, info in self.tensors.items():
            flat = buffer[info.start : info.stop]
            if info.start % SIZES[info.stored]:  # not aligned
                flat = flat.clone()
            tensors[name] = view_numbers(flat, info.dtype).view(info.shape)
        return tensors

    def read_blocks(self) -> Iterator[bytes]:
        """Yields all bytes of the file, header included.

        Raises:
            UnsupportedFormat: the file was changed since it was opened, or cannot be read.
        """
        file, start = self._open(), 0
        check_unchanged(self.path, self.state, file.status())
        while block := file.read(start, 1 << 20):
            yield block
            start += len(block)

    def close(self) -> None:
        """Closes the file, where it was kept open; later reads open it again.

        A read in another thread is finished first.
        """
        self._kept = None

    def _open(self) -> SharedFile:
        """Returns the file that is kept open, or opens it for one read."""
        return self._kept or SharedFile(self.path)

    def _read(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        start: int,
        watch: Watch | None = None,
    ) -> Tensor:
        """Reads `shape` elements of `dtype` from byte `start` of the data."""
        import torch

        numbers, size = find_torch_dtype(dtype), math.prod(shape) * SIZES[dtype]
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size:
            file = self._kept or SharedFile(self.path)
            read_stored(file, self, name, self.data_start + start, buffer.numpy().data)
        if watch is not None:
            watch(buffer)
        # Any byte but 0 and 1 in a torch.bool is undefined behaviour.
        return (buffer.ne(0) if dtype == "BOOL" else buffer.view(numbers)).reshape(shape)


class _OpenedFile(Protocol):
    """A file whose header was read."""

    path: Path
    state: FileState


def read_stored(
    file: SharedFile, opened: _OpenedFile, name: str, start: int, buffer: memoryview
) -> None:
    """Fills a buffer [bytes] with a tensor that begins at `start`.

    Raises:
        UnsupportedFormat: the file was changed since `opened`, ends inside or cannot be read.
    """
    check_unchanged(opened.path, opened.state, file.status())
    try:
        complete = file.fill(buffer, start)
    except OSError as error:
        raise input_error(opened.path, error, f"{name} cannot be read") from error
    if not complete:
        raise UnsupportedFormat(f"{opened.path}: ends inside {name}; run again")


def view_numbers(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """Views bytes as numbers of a dtype."""
    # Any byte but 0 and 1 in a torch.bool is undefined behaviour.
    return buffer.ne(0) if str(dtype) == "torch.bool" else buffer.view(dtype)


def _read_header(file: SharedFile, path: Path, size: int) -> bytes:
    """Reads the JSON text of the header, its length checked first."""
    head = file.read(0, 9)
    length = int.from_bytes(head[:8], "little")
    # Only the whole start tells: a header of 128 bytes begins with the 0x80 of a pickle.
    if len(head) < 9 or head[8:] != b"{" or length > _LONGEST_HEADER:
        _refuse_other_formats(head + file.read(9, _NAME_BYTES), path)
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
    if not file.fill(memoryview(raw), 8):
        raise UnsupportedFormat(f"{path}: ends inside its header; run again")
    return bytes(raw)


def _refuse_other_formats(head: bytes, path: Path) -> NoReturn:
    """Reports what a file with another beginning (`head`) is."""
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
    named = path.suffix == ".safetensors"
    way_out = "download it again" if named else "give the .safetensors file beside it"
    raise UnsupportedFormat(f"{path}: not a safetensors file; {way_out}")


def _refuse_pickle(path: Path, kind: str) -> UnsupportedFormat:
    """Makes the error of a pickle, with the command that converts it."""
    converted = path.with_suffix(".safetensors")
    if converted == path:  # a pickle that was merely renamed
        converted = path.with_suffix(".converted.safetensors")
    command = f'python -c "{_CONVERT_PICKLE}" {join_words([str(path), str(converted)])}'
    error = UnsupportedFormat(
        f"{path}: a pickle checkpoint{kind}; it can run code when it is loaded, so it is not read. "
        f"Convert it to safetensors once:\n{command}"
    )
    error.command = command
    return error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object; refuses two entries of one name."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _parse_header(raw: bytes, path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Parses a header's JSON text into (metadata, tensors)."""
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
    """Parses one tensor of a header; checks its size against dtype and shape."""
    if len(name) > _LONGEST_NAME:
        raise UnsupportedFormat(
            f"{path}: {name[:80]!r}… is a name of {len(name)} characters, more than any real one"
        )
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise UnsupportedFormat(f"{path}: its header is damaged at {name}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise UnsupportedFormat(f"{path}: {name} has the unknown dtype {dtype!r:.40}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    # That the bytes lie in the file is checked for all tensors together.
    pair = isinstance(offsets, list) and len(offsets) == 2
    if not (pair and type(offsets[0]) is type(offsets[1]) is int and _are_sizes(shape)):
        raise UnsupportedFormat(f"{path}: its header is damaged at {name}")
    start, stop = offsets
    count = math.prod(shape)
    # Beside a 0, torch still multiplies the other sizes: 0 x 2^40 x 2^40 overflows its strides.
    if (count or math.prod(size or 1 for size in shape)) >= 2**48:
        raise UnsupportedFormat(f"{path}: {name} has an impossible shape")
    if stop - start != count * SIZES[dtype]:
        raise UnsupportedFormat(
            f"{path}: {name}: bytes {start} to {stop} do not fit {dtype} of shape {shape!r:.80}"
        )
    return TensorInfo(dtype, tuple(shape), start, stop)


def _are_sizes(values: object) -> bool:
    """Recognises a list of at most 16 whole numbers below 2^48.

    No file is larger; True is no number here.
    """
    if not isinstance(values, list) or len(values) > 16:
        return False
    for value in values:  # of every tensor: a generator takes twice as long
        if type(value) is not int or not 0 <= value < 2**48:
            return False
    return True


def _check_extent(tensors: dict[str, TensorInfo], path: Path, size: int) -> None:
    """Checks that the tensors tile the `size` bytes after the header.

    No overlap, no hole, no excess.
    """
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
