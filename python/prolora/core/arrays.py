"""Arrays of other libraries, exchanged through DLPack."""

from __future__ import annotations

import logging
import numbers
import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Protocol, TypeVar

import torch.utils.dlpack
from torch import Tensor

from .exceptions import UnsupportedTensor


class SupportsDLPack(Protocol):
    """An array that other libraries can read in place: numpy's, cupy's."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any:
        """Hands out the memory."""
        ...


logger = logging.getLogger(__name__)

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
    if not hasattr(array, "__dlpack__") and not hasattr(array, "__cuda_array_interface__"):
        raise UnsupportedTensor(
            "prolora takes torch, numpy, cupy or jax arrays (anything with __dlpack__ or "
            f"__cuda_array_interface__), not {type(array).__name__}"
            + ("; give its .weight" if hasattr(array, "weight") else "")
        )
    try:
        if not hasattr(array, "__dlpack__"):
            return torch.as_tensor(array, device="cuda")
        return torch.utils.dlpack.from_dlpack(_copy_if_foreign(array))
    # A tracer of jax, or an array on a GPU for a torch without CUDA.
    except (AssertionError, AttributeError, BufferError, RuntimeError, TypeError) as error:
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


def find_other_array(arrays: Iterable[Any]) -> Any:
    """Returns the first array that is not torch's, None without one."""
    return next((array for array in arrays if not isinstance(array, Tensor)), None)


def to_kind_of(tensor: Tensor, template: Any) -> Any:
    """Converts the tensor to the kind of array that `template` is; None is torch's.

    A library that cannot read one leaves the tensor, and the log says so.
    """
    if template is None or isinstance(template, Tensor):
        return tensor
    namespace = getattr(template, "__array_namespace__", None)
    library = namespace() if namespace else sys.modules[type(template).__module__.partition(".")[0]]
    try:
        return library.from_dlpack(tensor.contiguous())
    except (AttributeError, BufferError, RuntimeError) as error:  # too old, or without bfloat16
        logger.warning("%s: %s, so the result is a torch tensor", library.__name__, error)
        return tensor


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
