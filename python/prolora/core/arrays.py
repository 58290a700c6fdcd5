"""Arrays of other libraries in and out, through DLPack and without a copy where they allow it."""

from __future__ import annotations

import sys
from typing import Any, Protocol, TypeVar

import torch.utils.dlpack
from torch import Tensor


class SupportsDLPack(Protocol):
    """An array that other libraries can read in place, as numpy's and cupy's."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any:
        """Hands out the memory."""
        ...


Array = TypeVar("Array", bound=SupportsDLPack)


def to_tensor(array: Any) -> Tensor:
    """A tensor over the same memory: torch tensors as they are, numpy, cupy, jax through DLPack."""
    if isinstance(array, Tensor):
        return array
    if hasattr(array, "flags") and hasattr(array.flags, "writeable") and not array.flags.writeable:
        array = array.copy()  # DLPack cannot export numpy's read-only memory
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"prolora takes torch, numpy or cupy arrays (anything with __dlpack__), "
            f"not {type(array).__name__}"
        )
    return torch.utils.dlpack.from_dlpack(array)


def to_kind_of(tensor: Tensor, template: Any) -> Any:
    """The tensor as the kind of array that `template` is."""
    if isinstance(template, Tensor):
        return tensor
    library = sys.modules[type(template).__module__.partition(".")[0]]
    return library.from_dlpack(tensor.contiguous())
