"""Trained biases and normalisation layers: what an adapter adds to the vectors of a model.

They are named `module.bias` and `module.weight`. Files hold differences, never whole vectors:
`diff_b` and a one-dimensional `diff` (ComfyUI, LyCORIS), `w_norm` and `b_norm` (LyCORIS), and the
bias of a LoRA's own second factor (PEFT), which has the scale of that LoRA in front of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..architectures.family import AuthorsWeight
from ..errors import ShapeMismatch, UnsupportedFormat
from ..files.dtypes import is_floating, spell_dtype
from .keys.codec import Module
from .lora import Lora


@dataclass
class VectorSlot:
    """A vector in a file."""

    module: Module  # what the key's path means
    tensor: str  # "bias" or "weight"
    key: str
    scaled: bool  # the scale of the module's update is in front of it

    @property
    def name(self) -> str:
        """The vector's name; of a fused weight's bias, the name of the fused one."""
        return f"{self.module.name}.{self.tensor}"


def check_vector(slot: VectorSlot, source: Lora) -> None:
    """Refuses a tensor that does not fit the vector its key names.

    Raises:
        ShapeMismatch: the shape is another.
        UnsupportedFormat: it is not stored as floating point.
    """
    header = source.tensors[slot.key]
    if not is_floating(header.dtype):
        raise UnsupportedFormat(
            f"{source.where}: {slot.key} is stored as {spell_dtype(header.dtype)}, not as "
            "floating point"
        )
    if len(header.shape) != 1 or header.shape[0] == 0:
        raise ShapeMismatch(
            f"{source.where}: {slot.key} {list(header.shape)} is not a {slot.tensor} vector"
        )
    if slot.module.matrix:
        if slot.module.matrix.swap == "if two":
            raise UnsupportedFormat(
                f"{source.where}: the halves of {slot.key} may be in another order than diffusers "
                "has them, and a vector does not tell; leave the tensor out"
            )
        split_rows(slot.module.matrix, header.shape[0], f"{source.where}: {slot.key}")


def find_vector_module(name: str) -> str:
    """Returns the module a vector belongs to."""
    return name.rpartition(".")[0]


def split_rows(whole: AuthorsWeight, height: int, where: str) -> tuple[int, ...]:
    """Returns the height of every part of a weight of `height` rows.

    Raises:
        ShapeMismatch: the rows do not divide evenly.
    """
    heights = whole.split_rows(height)
    if not heights:
        raise ShapeMismatch(
            f"{where}: {height} rows are not those of {' + '.join(whole.parts)}, "
            f"{':'.join(map(str, whole.shares))}"
        )
    return heights


def vector_suffixes(names: Iterable[str]) -> dict[str, str]:
    """Returns vector -> its key's suffix, as LyCORIS and ComfyUI read it."""
    every = dict.fromkeys(names)
    suffixes = {}
    for name in every:
        module, _, tensor = name.rpartition(".")
        is_norm = f"{module}.weight" in every
        suffixes[name] = "w_norm" if tensor == "weight" else "b_norm" if is_norm else "diff_b"
    return suffixes
