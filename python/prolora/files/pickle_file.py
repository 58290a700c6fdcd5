"""State dicts that `torch.save` wrote: read with torch's unpickler for weights, which runs no code.

It maps the tensors and so tells where they lie; they are read from there one at a time. Reading
mapped memory would end the process where somebody cuts the file meanwhile.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.types import Storage

from ..errors import UnsupportedFormat, input_error
from .outside import open_regular
from .safetensors_file import read_stored, refuse_old_pickle, view_numbers
from .state import FileState

# The first whose unpickler for weights has no known hole (CVE-2025-32434).
_SAFE_TORCH = (2, 6)
# Bytes of the pickle without its tensors: names, shapes and what a trainer noted.
_PICKLE_LIMIT = 64 << 20
# Bytes of a note, and of a zip entry's header before the lengths of its name and its extra field.
_NOTE, _LENGTHS = 64, 26
# Where trainers put the weights among other things, and what they call averages of them.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "network", "net", "params")
_AVERAGES = ("ema", "ema_model", "model_ema", "params_ema", "ema_state_dict", "state_dict_ema")


@dataclass(frozen=True)
class PickledTensor:
    """Dtype and shape of one tensor, and where it is.

    Attributes:
        dtype: of its numbers.
        shape: of the tensor.
        strides: numbers from one entry of an axis to the next.
        start: byte of the file at which its first number lies.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


class PickleFile:
    """A state dict in a file of `torch.save`; tensors are read one at a time.

    Attributes:
        path: the file.
        tensors: name -> `PickledTensor`, in the order of the file.
        state: of the file, when it was opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Maps the file.

        Raises:
            UnsupportedFormat: it is in the old format, holds objects other than tensors, no state
                dict or several, or is damaged.
        """
        self.path = Path(path)
        with open_regular(self.path) as file:
            self.state = FileState.from_status(os.fstat(file.fileno()))
            refuse_old_pickle(file.read(2), self.path)
            records = _list_records(self.path, self.state.size)
        storages: list[Storage] = []

        def keep(storage: Storage, _: str) -> Storage:
            storages.append(storage)
            return storage

        try:
            loaded = torch.load(self.path, map_location=keep, weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UnsupportedFormat(
                f"{self.path}: holds objects beside its tensors, which are not read because that "
                f"can run code ({_first_line(error)}); save its state dict alone"
            ) from error
        except OSError as error:
            raise input_error(self.path, error) from error
        except Exception as error:  # the unpickler's own, and what a damaged stack of its makes
            raise UnsupportedFormat(
                f"{self.path}: is damaged: {_first_line(error)}; download or save it again"
            ) from error
        base = _find_base(storages, records, self.path)
        self.tensors: dict[str, PickledTensor] = {}
        for name, tensor in _find_state_dict(loaded, self.path).items():
            _check_tensor(name, tensor, self.path, self.state.size)
            start = tensor.data_ptr() - base if tensor.numel() else 0
            shape, strides = tuple(tensor.shape), tensor.stride()
            self.tensors[name] = PickledTensor(tensor.dtype, shape, strides, start)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own.

        Raises:
            KeyError: no such tensor.
            UnsupportedFormat: the file was changed since it was opened.
        """
        return self._read(name, self.tensors[name].shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first axis."""
        shape = self.tensors[name].shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"{self.path}: rows {start}:{stop} of {name}, {list(shape)}")
        return self._read(name, (stop - start, *shape[1:]), start)

    def _read(self, name: str, shape: tuple[int, ...], row: int = 0) -> Tensor:
        """So many entries of a tensor's axes, from one row on."""
        held = self.tensors[name]
        if not math.prod(shape):
            return torch.empty(shape, dtype=held.dtype)
        size, steps = held.dtype.itemsize, zip(shape, held.strides, strict=True)
        span = 1 + sum((n - 1) * step for n, step in steps)
        buffer = torch.empty(span * size, dtype=torch.uint8)
        with open_regular(self.path) as file:
            start = held.start + (row * held.strides[0] * size if row else 0)
            read_stored(file, self, name, start, buffer)
        strided = view_numbers(buffer, held.dtype).as_strided(shape, held.strides)
        return strided if strided.is_contiguous() else strided.contiguous()


def is_readable_pickle(path: Path) -> bool:
    """Whether a file is one of `torch.save` that the torch at hand reads safely."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _SAFE_TORCH or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist()[:1])
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _list_records(path: Path, size: int) -> list[tuple[int, int]]:
    """(first byte, bytes) of all storages that hold something, in the order of the file.

    Raises:
        UnsupportedFormat: it holds more than it has bytes (`torch.save` compresses nothing), or
            numbers of the other byte order.
    """
    records, order = [], sys.byteorder.encode()
    try:
        with zipfile.ZipFile(path) as archive, open_regular(path) as file:
            entries = archive.infolist()
            for entry in entries:
                file.seek(entry.header_offset + _LENGTHS)
                lengths: tuple[int, int] = struct.unpack("<HH", file.read(4))
                start = file.seek(sum(lengths), os.SEEK_CUR)
                if entry.filename.endswith("/byteorder"):
                    order = file.read(min(entry.file_size, _NOTE))
                if entry.filename.split("/")[1:-1] == ["data"] and entry.file_size:
                    records.append((start, entry.file_size))
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise UnsupportedFormat(f"{path}: is damaged: {error}; download it again") from error
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    notes = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    held = sum(entry.file_size for entry in entries)
    if packed or held > size or notes > _PICKLE_LIMIT or order != sys.byteorder.encode():
        raise UnsupportedFormat(f"{path}: is not a file as torch.save writes it; save it again")
    return sorted(records)


def _find_base(storages: list[Storage], records: list[tuple[int, int]], path: Path) -> int:
    """The address of the file's first byte: the one from which storages and records are equal.

    Raises:
        UnsupportedFormat: there are other storages than records.
    """
    mapped = sorted((held.data_ptr(), held.nbytes()) for held in storages if held.nbytes())
    base = mapped[0][0] - records[0][0] if mapped and records else 0
    if [(start - base, size) for start, size in mapped] != records:
        raise UnsupportedFormat(f"{path}: is not a file as torch.save writes it; save it again")
    return base


def _find_state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    """{name: tensor}: what was saved, or the one state dict in it.

    Raises:
        UnsupportedFormat: there is none, or several that differ.
    """
    if not isinstance(loaded, Mapping):
        raise UnsupportedFormat(
            f"{path}: holds a {type(loaded).__name__}, not a state dict; save its state_dict()"
        )
    nested = {
        name: state
        for name in (*_NESTED, *_AVERAGES)
        if isinstance(state := loaded.get(name), Mapping) and _list_tensors(state)
    }
    if len(nested) > 1:
        raise UnsupportedFormat(
            f"{path}: holds several sets of weights ({', '.join(nested)}); save the one that is "
            "meant as a state dict of its own"
        )
    tensors = _list_tensors(next(iter(nested.values()), loaded))
    if not tensors:
        raise UnsupportedFormat(f"{path}: holds no tensors by name; save a state dict")
    return tensors


def _list_tensors(state: Mapping[object, object]) -> dict[str, Tensor]:
    return {
        name: value.detach()
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _check_tensor(name: str, tensor: Tensor, path: Path, size: int) -> None:
    """Refuses a tensor without plain numbers, or with more than the file has room for."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    plain = plain and not tensor.is_conj() and not tensor.is_neg()
    if not plain or math.prod(tensor.shape) * tensor.element_size() > size:
        raise UnsupportedFormat(f"{path}: {name:.80} holds no numbers as they stand; save it again")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
