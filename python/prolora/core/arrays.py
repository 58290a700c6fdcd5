"""Arrays of other libraries, exchanged through DLPack."""

from __future__ import annotations

import numbers
import sys
from dataclasses import fields
from typing import Any, Protocol, TypeVar

import torch.utils.dlpack
from torch import Tensor

from .errors import UnsupportedTensor


class SupportsDLPack(Protocol):
    """An array that other libraries can read in place: numpy's, cupy's."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any:
        """Hands out the memory."""
        ...


Array = TypeVar("Array", bound=SupportsDLPack)

MatrixLike = Tensor | SupportsDLPack
"""A weight or an update, or a stack of them: an array of torch, numpy, cupy or jax."""


def to_tensor(array: MatrixLike, name: str = "the array") -> Tensor:
    """Returns a tensor over an array's memory: numpy, cupy, jax through DLPack.

    Torch tensors come back as they are. Arrays of numpy that are read-only, run backwards or are
    stored in the other byte order are copied: a torch tensor cannot be any of that.

    Args:
        array: anything with `__dlpack__`.
        name: for the error.

    Raises:
        UnsupportedTensor: not an array, or a dtype that torch does not have.
    """
    if isinstance(array, Tensor):
        return array
    if not hasattr(array, "__dlpack__"):
        raise UnsupportedTensor(
            f"prolora takes torch, numpy or cupy arrays (anything with __dlpack__), "
            f"not {type(array).__name__}"
        )
    try:
        return torch.utils.dlpack.from_dlpack(_copy_if_foreign(array))
    except (BufferError, RuntimeError, TypeError) as error:
        kind = f"{type(array).__name__} of {getattr(array, 'dtype', 'unknown dtype')}"
        raise UnsupportedTensor(f"{name}, {kind}, cannot become a tensor: {error}") from error


def _copy_if_foreign(array: Any) -> Any:
    """Copies an array only if DLPack cannot describe its memory."""
    if not getattr(getattr(array, "dtype", None), "isnative", True):
        return array.astype(array.dtype.newbyteorder("="))
    read_only = not getattr(getattr(array, "flags", None), "writeable", True)
    if read_only or any(stride < 0 for stride in getattr(array, "strides", None) or ()):
        return array.copy()
    return array


def to_kind_of(tensor: Tensor, template: Any) -> Any:
    """Converts the tensor to the kind of array that `template` is."""
    if isinstance(template, Tensor):
        return tensor
    library = sys.modules[type(template).__module__.partition(".")[0]]
    return library.from_dlpack(tensor.contiguous())


def to_plain_number(value: Any) -> Any:
    """Turns a number of numpy into a number of Python; other values stay.

    numpy's print otherwise (`np.int64(8)`), and numpy's float64 is a float of another name.
    """
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def make_fields_plain(options: Any) -> None:
    """Replaces each field of a frozen dataclass by its `to_plain_number`."""
    for field in fields(options):
        object.__setattr__(options, field.name, to_plain_number(getattr(options, field.name)))
