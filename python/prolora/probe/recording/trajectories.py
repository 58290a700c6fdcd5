"""The probes: the calls that a sampler makes to a model, recorded so that they can be replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ProLoRAError
from ..hooks import keep_hooks

Sample = Callable[[int], Any]
"""Runs a pipeline from pure noise with the given seed; the return value is not used."""


@dataclass(frozen=True)
class Call:
    """One call of a model: its inputs, and the trajectory it lies on.

    Attributes:
        args: positional arguments of the model's forward.
        kwargs: its keyword arguments.
        origin: "source", "adapted" (the source with its LoRA), "target", or "pair" (PAIR in
            translation.py); a translated call inherits it.
        trajectories: number of the sampled image of every sample; empty where nobody asked.
        clean: x₀ of every sample [n, ...], for calls about images that were made from it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: str = ""
    trajectories: tuple[int, ...] = ()
    clean: Tensor | None = None


def record_calls(model: nn.Module, sample: Sample, seed: int, origin: str) -> list[Call]:
    """The calls that a sampler makes to `model`, in order.

    Args:
        model: the module that the sampler runs.
        sample: the sampler, bound to that module.
        seed: given to the sampler.
        origin: stored in every call.

    Raises:
        ProLoRAError: the sampler never called the model, or makes NaN or Inf.
    """
    calls: list[Call] = []
    pool = _TensorPool()

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_sampled(next(filter(_is_floating, (*args, *kwargs.values())), None), origin)
        calls.append(Call(pool.copy(args), pool.copy(kwargs), origin))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    with keep_hooks([hook]), torch.no_grad():
        sample(seed)
    if not calls:
        raise ProLoRAError(
            f"the sampler of the {origin} trajectories never called the model it was given for; "
            "pass the very module that the pipeline runs (its unet or transformer)"
        )
    return calls


def check_sampled(latent: Tensor | None, origin: str) -> None:
    """Refuses a sampling that makes numbers that are none, before more of it is done.

    Raises:
        ProLoRAError: the latents hold NaN or Inf.
    """
    if latent is not None and not bool(torch.isfinite(latent).all()):
        whose = "source with its LoRA" if origin == "adapted" else origin
        raise ProLoRAError(
            f"sampling the {whose} makes NaN or Inf: its weights are damaged, or the settings of "
            "the sampling do not suit it"
        )


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _TensorPool:
    """Copies of recorded tensors, one for equal ones: text embeddings stay the same all along."""

    def __init__(self) -> None:
        self._recent: dict[tuple[Any, ...], list[Tensor]] = {}

    def copy(self, value: Any) -> Any:
        """The value with its tensors cloned, since samplers reuse buffers."""
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, dict):
            return {key: self.copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.copy(item) for item in value)
        return value

    def _copy_tensor(self, value: Tensor) -> Tensor:
        recent = self._recent.setdefault((value.shape, value.dtype, value.device), [])
        for copied in recent:
            if torch.equal(copied, value):
                return copied
        recent.append(value.clone())
        del recent[:-3]  # latents never repeat; tensors before them are no longer compared
        return recent[-1]


def output_of(result: Any) -> Tensor:
    """The predicted tensor of a model's return value: itself, the first of a tuple, `.sample`.

    Raises:
        ProLoRAError: it holds no tensor in any of these places.
    """
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple | list):
        return output_of(result[0])
    if hasattr(result, "sample"):
        return output_of(result.sample)
    raise ProLoRAError(f"a model returned {type(result).__name__}, which holds no prediction")


@torch.no_grad()
def predict_call(model: nn.Module, call: Call, read: Callable[[Any], Tensor] = output_of) -> Tensor:
    """The prediction of a model at a recorded call."""
    return read(model(*call.args, **call.kwargs))
