"""Trained biases and normalisation layers: what an adapter adds to the vectors of a model.

They are named `module.bias` and `module.weight`. Files hold differences, never whole vectors:
`diff_b` and a one-dimensional `diff` (ComfyUI, LyCORIS), `w_norm` and `b_norm` (LyCORIS), and the
bias of a LoRA's own second factor (PEFT), which has the scale of that LoRA in front of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..architectures.family import AuthorsWeight, Family
from ..errors import NonFiniteWeights, OutputError, ShapeMismatch, UnsupportedFormat
from ..files.dtypes import is_floating, spell_dtype
from .keys.module_names import ModulePath
from .lora import Lora, read_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class VectorSlot:
    """A vector in a file."""

    module: ModulePath  # what the key's path means
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
    header = source.headers[slot.key]
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


def read_vector(slot: VectorSlot, scale: float, source: Lora) -> dict[str, Tensor]:
    """Reads the vectors of a slot by name, float32: several for a fused weight.

    Raises:
        NonFiniteWeights: NaN or Inf, or an overflow in the scale.
    """
    vector = read_finite(source, slot.key)
    if slot.scaled and scale != 1:
        vector *= scale
        if not vector.isfinite().all():
            raise NonFiniteWeights(f"{source.where}: {slot.key} times {scale:.6g} overflows")
    matrix = slot.module.matrix
    if matrix is None:
        return {slot.name: vector}
    if matrix.swap == "always":
        vector = swap_halves(vector)
    parts = vector.split(split_rows(matrix, len(vector), source.where))
    nonzero = {
        f"{name}.{slot.tensor}": part.clone()
        for name, part in zip(matrix.parts, parts, strict=True)
        if part.any()
    }
    return nonzero or {f"{matrix.parts[0]}.{slot.tensor}": parts[0].clone()}


def find_vector_module(name: str) -> str:
    """Returns the module a vector belongs to."""
    return name.rpartition(".")[0]


def split_rows(whole: AuthorsWeight, height: int, where: str) -> list[int]:
    """Returns the height of every part of a weight of `height` rows.

    Raises:
        ShapeMismatch: the rows do not divide evenly.
    """
    unit, rest = divmod(height, sum(whole.shares))
    if rest or not unit or (whole.swap == "always" and height % 2):
        raise ShapeMismatch(
            f"{where}: {height} rows are not those of {' + '.join(whole.parts)}, "
            f"{':'.join(map(str, whole.shares))}"
        )
    return [share * unit for share in whole.shares]


def swap_halves(tensor: Tensor) -> Tensor:
    """Puts the lower half of the rows above the upper half."""
    return tensor.roll(len(tensor) // 2, 0)


def fuse_vectors(vectors: Mapping[str, Tensor], authors: Family | None) -> dict[str, Tensor]:
    """Fuses biases for a file with the authors' names.

    A part without a bias of its own gets zeros. `authors` is the family whose authors' names the
    file has; None where it has diffusers'.

    Raises:
        ShapeMismatch: the parts do not belong to one weight.
    """
    out: dict[str, Tensor] = {}
    for name, vector in vectors.items():
        module, _, tensor = name.rpartition(".")
        matrix = authors.find_weight_holding(module) if authors else None
        if matrix is None or (len(matrix.parts) == 1 and matrix.swap == "never"):
            out[name] = vector
            continue
        shares = dict(zip(matrix.parts, matrix.shares, strict=True))
        unit, rest = divmod(len(vector), shares[module])
        if rest:
            raise ShapeMismatch(f"{name}: {len(vector)} values are not those of {matrix.name}")
        whole = out.setdefault(
            f"{matrix.name}.{tensor}", vector.new_zeros(unit * sum(matrix.shares))
        )
        heights = [share * unit for share in matrix.shares]
        if sum(heights) != len(whole):
            raise ShapeMismatch(f"{name}: does not fit the other parts of {matrix.name}")
        top = sum(heights[: matrix.parts.index(module)])
        whole[top : top + len(vector)] = swap_halves(vector) if matrix.swap == "always" else vector
    return out


def vector_suffixes(names: Iterable[str]) -> dict[str, str]:
    """Returns vector -> its key's suffix, as LyCORIS and ComfyUI read it."""
    every = dict.fromkeys(names)
    suffixes = {}
    for name in every:
        module, _, tensor = name.rpartition(".")
        is_norm = f"{module}.weight" in every
        suffixes[name] = "w_norm" if tensor == "weight" else "b_norm" if is_norm else "diff_b"
    return suffixes


def cast_vector(name: str, vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts the vector to the dtype of a file.

    Raises:
        NonFiniteWeights: it is not finite, or overflows in `dtype`.
        OutputError: it is too small for `dtype` to hold.
    """
    if not vector.isfinite().all():
        raise NonFiniteWeights(f"{name}: holds NaN or Inf, so nothing is written")
    stored = vector.to(dtype)
    if not stored.isfinite().all():
        raise NonFiniteWeights(f"{name}: overflows in {dtype}; write it with `dtype='float32'`")
    if not vectors_match(stored, vector, dtype):
        raise OutputError(f"{name}: is too small for {dtype}; write it with `dtype='float32'`")
    return stored


def vectors_match(back: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Compares two vectors to within the rounding of `dtype`."""
    if back.shape != wanted.shape:
        return False
    import torch

    limit = torch.finfo(dtype).eps
    difference = (back.double() - wanted.double()).norm()
    return bool(difference <= limit * wanted.double().norm())
