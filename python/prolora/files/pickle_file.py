"""State dicts that `torch.save` wrote: read with torch's unpickler for weights, which runs no code.

The tensors are mapped, not read: a checkpoint of several GB is looked at one weight at a time.
"""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UnsupportedFormat, input_error
from .outside import open_regular
from .state import FileState, check_unchanged

# The first whose unpickler for weights has no known hole (CVE-2025-32434).
_SAFE_TORCH = (2, 6)
# Bytes of the pickle without its tensors: names, shapes and what a trainer noted.
_PICKLE_LIMIT = 64 << 20
# Where trainers put the weights among other things, and what they call averages of them.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "network", "net", "params")
_AVERAGES = ("ema", "ema_model", "model_ema", "params_ema", "ema_state_dict", "state_dict_ema")


@dataclass(frozen=True)
class PickledTensor:
    """Dtype and shape of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


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
            UnsupportedFormat: it holds objects other than tensors, no state dict or several, or is
                damaged.
        """
        self.path = Path(path)
        with open_regular(self.path) as file:
            self.state = FileState.from_status(os.fstat(file.fileno()))
            _check_archive(self.path, self.state.size)
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
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
        self._tensors = _find_state_dict(loaded, self.path)
        for name, tensor in self._tensors.items():
            _check_tensor(name, tensor, self.path, self.state.size)
        self.tensors = {
            name: PickledTensor(tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own.

        Raises:
            KeyError: no such tensor.
            UnsupportedFormat: the file was changed since it was opened.
        """
        tensor = self._tensors[name]
        with open_regular(self.path) as file:
            check_unchanged(self.path, self.state, file.fileno())
        return tensor.clone(memory_format=torch.contiguous_format)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first axis."""
        tensor = self._tensors[name]
        if not tensor.dim() or not 0 <= start <= stop <= len(tensor):
            raise IndexError(f"{self.path}: rows {start}:{stop} of {name}, {list(tensor.shape)}")
        with open_regular(self.path) as file:
            check_unchanged(self.path, self.state, file.fileno())
        return tensor[start:stop].clone(memory_format=torch.contiguous_format)


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


def _check_archive(path: Path, size: int) -> None:
    """Refuses an archive that holds more than it has bytes: `torch.save` compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UnsupportedFormat(f"{path}: is damaged: {error}; download it again") from error
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    notes = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if packed or sum(entry.file_size for entry in entries) > size or notes > _PICKLE_LIMIT:
        raise UnsupportedFormat(f"{path}: is not a file as torch.save writes it; save it again")


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
    if not plain or math.prod(tensor.shape) * tensor.element_size() > size:
        raise UnsupportedFormat(f"{path}: {name:.80} holds no numbers as they stand; save it again")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
