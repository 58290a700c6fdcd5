"""Reading of updates and weights: array types, shapes and finite values are checked here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .affinity import Affinity
from .arrays import MatrixLike, SupportsDLPack, find_other_array, to_kind_of, to_tensor
from .basis import CONVOLUTION, Basis
from .exceptions import NonFiniteWeights, ShapeMismatch, UnrelatedBases
from .lowrank import LowRank
from .precision import is_finite
from .validation import check_operand, without_gradient
from .verdict import AUTO, judge_pairs


@dataclass(frozen=True)
class Update:
    """A checked update, and what is needed to return a result of the same form.

    Attributes:
        value: a dense update [m, n], a stack [b, m, n] or a convolution [out, in, …]; or factors,
            those of a convolution flattened to [out, r] and [r, in · …].
        example: an array of the library that the result is converted to; None for torch.
        kernel: [in, …] of a convolution that was given as factors, for example (320, 3, 3).
    """

    value: Tensor | LowRank
    example: Any = None
    kernel: tuple[int, ...] = ()

    @classmethod
    def read(cls, delta: Any) -> Update:
        """Reads a dense array, a `LowRank` or a pair (up, down).

        Raises:
            ShapeMismatch, NonFiniteWeights, UnsupportedTensor, UnsupportedDevice: as `project`.
        """
        kernel = tuple[int, ...]()
        if isinstance(delta, LowRank):
            value, example = delta, None
        elif isinstance(delta, tuple | list):
            example = find_other_array(delta)
            value, kernel = read_pair(delta)
        else:
            tensor = to_tensor(delta, "delta")
            _check_tensor("delta", tensor)
            return cls(tensor, delta)
        for name in ("up", "down"):
            _check_tensor(f"delta.{name}", getattr(value, name))
        return cls(value, example, kernel)

    @property
    def matrix(self) -> Tensor | LowRank:
        """The update as a matrix or a stack of matrices: a dense convolution is flattened."""
        value = self.value
        if isinstance(value, Tensor) and value.ndim in CONVOLUTION:
            return value.flatten(1)
        return value

    def restore(self, moved: Tensor | LowRank) -> SupportsDLPack | LowRank | tuple[Any, Any]:
        """Returns a moved update in the dtype, shape and array type of this one."""
        if isinstance(moved, Tensor):
            dense = moved.to(self.value.dtype).reshape(self.value.shape)
            array: SupportsDLPack = to_kind_of(dense, self.example)
            return array
        # Contiguous, so that safetensors can save the factors.
        up, down = (factor.contiguous() for factor in moved.to(self.value.dtype))
        if not self.kernel and self.example is None:
            return LowRank(up, down)
        if self.kernel:
            up = up.unflatten(-1, [-1, *([1] * (len(self.kernel) - 1))])
            down = down.unflatten(-1, self.kernel)
        return to_kind_of(up, self.example), to_kind_of(down, self.example)


def read_pair(factors: Sequence[Any], name: str = "delta") -> tuple[LowRank, tuple[int, ...]]:
    """Reads a pair (up, down).

    Returns:
        The factors as matrices; and [in, …] if they are a convolution's, for example (320, 3, 3).
    """
    tensors = [to_tensor(factor, f"factor {i} of {name}") for i, factor in enumerate(factors)]
    if len(tensors) != 2:
        raise ShapeMismatch(f"{name} is a pair (up, down), not {len(tensors)} arrays")
    up, down = tensors
    if up.ndim == down.ndim and up.ndim in CONVOLUTION and {*up.shape[2:]} == {1}:
        return LowRank(up.flatten(1), down.flatten(1)), tuple(down.shape[1:])
    return LowRank(up, down), ()


def _check_tensor(name: str, tensor: Tensor) -> None:
    check_operand(name, tensor)
    if tensor.ndim < 2:
        raise ShapeMismatch(
            f"{name} is {list(tensor.shape)}, and a bias has no singular subspaces; copy it"
        )
    _check_finite(name, tensor)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise NonFiniteWeights(f"NaN or Inf in {name}")


def read_weights(
    W_src: Any, W_tgt: Any, update: Tensor | LowRank
) -> tuple[Tensor | Basis, Tensor | Basis]:
    """Reads both weights as matrices [m, n] or stacks [b, m, n] of the shape of an update.

    Raises:
        ShapeMismatch, NonFiniteWeights, UnsupportedTensor, UnsupportedDevice, NoDerivative: as
            `project`.
    """
    shape = update.shape
    source, target = (
        weight if isinstance(weight, Basis) else _read_tensor(weight, name)
        for name, weight in (("W_src", W_src), ("W_tgt", W_tgt))
    )
    if len(shape) == 2 and source.shape != target.shape and len(source.shape) in CONVOLUTION:
        raise ShapeMismatch(f"W_src is {list(source.shape)} but W_tgt {list(target.shape)}")
    if isinstance(update, LowRank) and shape[-2:] != source.shape[-2:]:
        if source.shape[-2:] == (update.down.shape[-2], update.up.shape[-1]):
            raise ShapeMismatch("up @ down is not of W_src's shape; are they in the other order?")
    return _read_weight(source, shape, "W_src"), _read_weight(target, shape, "W_tgt")


def _read_tensor(weight: MatrixLike, name: str) -> Tensor:
    tensor = to_tensor(weight, name)
    check_operand(name, tensor)
    return without_gradient("project", name, tensor)


def _read_weight(weight: Tensor | Basis, shape: torch.Size, name: str) -> Tensor | Basis:
    """Returns a weight as a matrix or a stack if it has the shape of the update."""
    is_convolution = len(shape) in CONVOLUTION
    given = weight.shape
    if len(shape) == 3 and len(given) == 2:  # several updates of one weight
        shape = torch.Size(shape[1:])
    if len(shape) == len(given) == 3 and shape[0] != given[0] and shape[1:] == given[1:]:
        raise ShapeMismatch(f"{name}: {shape[0]} updates but {given[0]} weights; give as many")
    if isinstance(weight, Basis):
        flat = torch.Size((shape[0], shape[1:].numel())) if is_convolution else shape
        if weight.shape != flat:
            raise ShapeMismatch(f"{name} is a basis of {list(weight.shape)}, delta {list(shape)}")
        return weight
    if weight.ndim in CONVOLUTION and len(shape) == 2:  # the update is factors of a convolution
        weight = weight.flatten(1)
    if weight.shape != shape:
        swapped = weight.shape == torch.Size((*shape[:-2], shape[-1], shape[-2]))
        hint = "; is it transposed?" if swapped else "; an update fits weights of its own shape"
        raise ShapeMismatch(f"{name} is {list(weight.shape)} but delta {list(shape)}{hint}")
    _check_finite(name, weight)
    return weight.flatten(1) if is_convolution else weight


def check_related(source: Tensor | Basis, target: Tensor | Basis) -> None:
    """Raises UnrelatedBases if two weights [..., m, n] are too different for a copy.

    Raises:
        UnrelatedBases: their cosine is too small (`judge_pairs`).
        ValueError: one of them is a Basis, which has lost what the comparison needs.
    """
    if isinstance(source, Basis) or isinstance(target, Basis):
        raise ValueError(f"method {AUTO!r} needs the weights themselves, not their Basis")
    sides = [w.reshape(-1, *w.shape[-2:]) for w in (source, target.to(source.device))]
    if len({len(side) for side in sides}) > 1:  # one weight and a stack
        sides = torch.broadcast_tensors(*sides)
    if not len(sides[0]):
        return
    verdict = judge_pairs(Affinity.of(*pair) for pair in zip(*sides, strict=True))
    if not verdict.related:
        raise UnrelatedBases(f"{verdict.sentence()} method='copy' copies it anyway")
