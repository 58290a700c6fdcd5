"""The probes: the calls a sampler makes to a model, recorded so that any model can replay them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.lowrank import LowRank
from ..errors import ProLoRAError, ShapeMismatch
from .hooks import keep_hooks
from .precision import HALVES

Sample = Callable[[int], Any]
"""Runs a pipeline from pure noise with the given seed; what it returns is not used."""


@dataclass(frozen=True)
class Call:
    """One call of a model: its inputs, and whose trajectory it lies on.

    Attributes:
        args: positional arguments of the model's forward.
        kwargs: its keyword arguments.
        origin: "source", "adapted" (the source with its LoRA) or "target"; a translated call
            inherits it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: str = ""


def record_calls(model: nn.Module, sample: Sample, seed: int, origin: str) -> list[Call]:
    """The calls that a sampler makes to `model`, in order.

    Args:
        model: the module that the sampler runs.
        sample: the sampler, bound to that module.
        seed: given to the sampler.
        origin: stored in every call.

    Raises:
        ProLoRAError: the sampler never called the model.
    """
    calls: list[Call] = []
    known = _TensorPool()

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(known.copied(args), known.copied(kwargs), origin))

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    with keep_hooks([hook]), torch.no_grad():
        sample(seed)
    if not calls:
        raise ProLoRAError(
            f"the sampler of the {origin} trajectories never called the model it was given for; "
            "pass the very module that the pipeline runs (its unet or transformer)"
        )
    return calls


class _TensorPool:
    """Finds what was recorded before: text embeddings are the same ones at every step."""

    def __init__(self) -> None:
        """Knows nothing."""
        self._last: dict[tuple[Any, ...], list[Tensor]] = {}

    def copied(self, value: Any) -> Any:
        """Tensors cloned, since samplers reuse buffers, unless an equal one is at hand."""
        if isinstance(value, Tensor):
            return self._tensor(value.detach())
        if isinstance(value, dict):
            return {key: self.copied(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.copied(item) for item in value)
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        last = self._last.setdefault((value.shape, value.dtype, value.device), [])
        for known in last:
            if torch.equal(known, value):
                return known
        last.append(value.clone())
        del last[:-3]  # latents are never equal; those before are no longer looked at
        return last[-1]


def output_of(result: Any) -> Tensor:
    """The predicted tensor of a model's return value: itself, the first of a tuple, `.sample`."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple | list):
        return output_of(result[0])
    if hasattr(result, "sample"):
        return output_of(result.sample)
    raise ProLoRAError(f"a model returned {type(result).__name__}, which holds no prediction")


@torch.no_grad()
def predict_call(model: nn.Module, call: Call, read: Callable[[Any], Tensor] = output_of) -> Tensor:
    """What the model predicts at a recorded call."""
    return read(model(*call.args, **call.kwargs))


@contextlib.contextmanager
def apply_updates(
    model: nn.Module, updates: Mapping[str, LowRank], strength: float = 1.0
) -> Iterator[None]:
    """The model with the updates in its weights, for a while; afterwards bit for bit as before.

    A weight stored in half precision becomes float32 meanwhile: an update is not rounded to it.
    """
    kept: dict[str, Tensor] = {}
    try:
        for name, update in updates.items():
            weight = weight_of(model, name, convolution=True)
            if weight.flatten(1).shape != update.shape:
                raise ShapeMismatch(
                    f"the update of {name} is {list(update.shape)}, its weight {list(weight.shape)}"
                )
            change = (strength * update.dense()).reshape(weight.shape)
            if weight.dtype in HALVES:
                kept[name] = weight
                wide = weight.detach().float() + change.to(weight.device, torch.float32)
                _replace(model, name, nn.Parameter(wide, requires_grad=False))
            else:
                kept[name] = weight.detach().clone()
                with torch.no_grad():
                    weight += change.to(weight)
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                if weight.dtype in HALVES:
                    _replace(model, name, weight)
                else:
                    weight_of(model, name, convolution=True).copy_(weight)


def _replace(model: nn.Module, name: str, weight: Tensor) -> None:
    """Another parameter as the weight of a module."""
    model.get_submodule(name)._parameters["weight"] = weight  # type: ignore[assignment]


def weight_of(model: nn.Module, name: str, convolution: bool = False) -> Tensor:
    """The weight of a linear module by its name, or of a convolution where one may be."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ProLoRAError(
            f"the model has no module {name}; pass the module that the LoRA's names start from"
        ) from error
    weight = getattr(module, "weight", None)
    axes = weight.dim() if isinstance(weight, Tensor) else 0
    if not isinstance(weight, Tensor) or axes < 2 or (axes > 2 and not convolution):
        raise ProLoRAError(f"{name} is no linear module; probing moves linear modules only")
    return weight
