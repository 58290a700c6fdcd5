"""Updates in the weights of a running model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..core.lowrank import LowRank
from ..errors import ProLoRAError, ShapeMismatch
from .precision import HALVES


@contextlib.contextmanager
def apply_updates(
    model: nn.Module, updates: Mapping[str, LowRank], strength: float = 1.0
) -> Iterator[None]:
    """Adds the updates to the model's weights; afterwards they are bit for bit as before.

    A weight stored in half precision is float32 meanwhile, so that no update is rounded to it.

    Args:
        model: the model.
        updates: module -> D [m, n]; a convolution's weight is flattened to [m, n].
        strength: factor of all of them.

    Raises:
        ProLoRAError: the model has no such module.
        ShapeMismatch: an update and its weight differ in shape.
    """
    stored: dict[str, Tensor] = {}
    try:
        for name, update in updates.items():
            weight = weight_of(model, name, convolution=True)
            if weight.flatten(1).shape != update.shape:
                raise ShapeMismatch(
                    f"the update of {name} is {list(update.shape)}, its weight {list(weight.shape)}"
                )
            change = (strength * update.dense()).reshape(weight.shape)
            if weight.dtype in HALVES:
                stored[name] = weight
                wide = weight.detach().float() + change.to(weight.device, torch.float32)
                _replace_weight(model, name, nn.Parameter(wide, requires_grad=False))
            else:
                stored[name] = weight.detach().clone()
                with torch.no_grad():
                    weight += change.to(weight)
        yield
    finally:
        with torch.no_grad():
            for name, weight in stored.items():
                if weight.dtype in HALVES:
                    _replace_weight(model, name, weight)
                else:
                    weight_of(model, name, convolution=True).copy_(weight)


def _replace_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    """Sets another parameter as the weight of a module."""
    model.get_submodule(name)._parameters["weight"] = weight  # type: ignore[assignment]


def weight_of(model: nn.Module, name: str, convolution: bool = False) -> Tensor:
    """The weight of a linear module by its name.

    Args:
        model: the model.
        name: of the module.
        convolution: whether a convolution will do as well.

    Raises:
        ProLoRAError: the model has no such module, or it is of another kind.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ProLoRAError(
            f"the model has no module {name}; pass the module that the LoRA's names start from"
        ) from error
    weight = getattr(module, "weight", None)
    axes = weight.dim() if isinstance(weight, Tensor) else 0
    if not isinstance(weight, Tensor) or axes < 2 or (axes > 2 and not convolution):
        raise ProLoRAError(f"{name} is not a linear module; probing moves linear modules only")
    return weight
