"""Recorded calls of a sampler, and their form in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ProLoRAError
from ..updates import keep_hooks

Sample = Callable[[int], Any]
"""Runs a pipeline from pure noise with the given seed; one that draws images in turn yields after
each, and any other return value is not used."""
_MOST = 1 << 16  # images of a seed, and samples of a call


@dataclass(frozen=True)
class Call:
    """One call of a model: its inputs and its trajectory."""

    args: tuple[Any, ...]  # positional arguments of the model's forward
    kwargs: dict[str, Any]  # its keyword arguments
    # "source", "adapted" (the source with its LoRA), "target", or "pair" (PAIR in translation.py);
    # a translated call inherits it
    origin: str = ""
    # Number of the sampled image of every sample; empty if not asked for
    trajectories: tuple[int, ...] = ()
    # X₀ of every sample [n, ...], for calls about images that were made from it
    clean: Tensor | None = None


def record_calls(model: nn.Module, sample: Sample, seed: int, origin: str) -> list[Call]:
    """Records the calls that a sampler, bound to `model`, makes to it, in order.

    Samples of a call are different images, unless they are equal: branches of the guidance.
    """
    calls: list[Call] = []
    pool, image = _TensorPool(), seed * _MOST

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        check_sampled(next((x for x in given if x.is_floating_point()), None), origin)
        call = Call(pool.copy(args), pool.copy(kwargs), origin)
        rows = samples_of(call)
        first = [
            next((j for j in range(i) if torch.equal(rows[j], rows[i])), i)
            for i in range(len(rows))
        ]
        calls.append(replace(call, trajectories=tuple(image * _MOST + j for j in first)))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    with keep_hooks([hook]), torch.no_grad():
        drawn = sample(seed)
        for _ in drawn if isinstance(drawn, Iterator) else ():
            image += 1
    if not calls:
        raise ProLoRAError(
            f"the sampler of the {origin} trajectories never called the model it was given for; "
            "pass the very module that the pipeline runs (its unet or transformer)"
        )
    return calls


def samples_of(call: Call) -> Sequence[Tensor]:
    """Returns a call's samples: the rows of its first tensor with two axes or more, or a list's."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, list) and value and all(isinstance(x, Tensor) for x in value):
            return value
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.unbind()
    return [torch.zeros(0)]


def check_sampled(latent: Tensor | None, origin: str) -> None:
    """Refuses a sampling with NaN or Inf before more of it is done."""
    if latent is not None and not bool(torch.isfinite(latent).all()):
        whose = "source with its LoRA" if origin == "adapted" else origin
        raise ProLoRAError(
            f"sampling the {whose} makes NaN or Inf: its weights are damaged, or the settings of "
            "the sampling do not suit it"
        )


class _TensorPool:
    """Copies of recorded tensors, one for equal ones: text embeddings stay the same all along."""

    def __init__(self) -> None:
        self._recent: dict[tuple[Any, ...], list[Tensor]] = {}

    def copy(self, value: Any) -> Any:
        """Clones the tensors in a value, since samplers reuse buffers."""
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
    """Returns the predicted tensor: the value itself, a tuple's first, or `.sample`.

    A list of tensors is one of samples.
    """
    if isinstance(result, Tensor):
        return result
    if isinstance(result, list) and result and all(isinstance(x, Tensor) for x in result):
        return torch.stack(result)
    if isinstance(result, tuple | list) and result:
        return output_of(result[0])
    if hasattr(result, "sample"):
        return output_of(result.sample)
    raise ProLoRAError(f"a model returned {type(result).__name__}, which holds no prediction")


@torch.no_grad()
def predict_call(model: nn.Module, call: Call, read: Callable[[Any], Tensor] = output_of) -> Tensor:
    """Returns the prediction of a model at a recorded call."""
    return read(model(*call.args, **call.kwargs))


_PLAIN = (bool, int, float, str, type(None))


def encode_calls(calls: Iterable[Call]) -> tuple[list[Tensor], str]:
    """Encodes calls as tensors, each object once, and a text of their positions."""
    tensors: list[Tensor] = []
    positions: dict[int, int] = {}

    def encode(value: Any) -> dict[str, Any]:
        if isinstance(value, Tensor):
            if id(value) not in positions:
                positions[id(value)] = len(tensors)
                tensors.append(value)
            return {"tensor": positions[id(value)]}
        if isinstance(value, _PLAIN):
            return {"plain": value}
        if isinstance(value, dict):
            return {"dict": {str(key): encode(item) for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [encode(item) for item in value]}
        raise ProLoRAError(
            f"a model was called with a {type(value).__name__}, which cannot be kept in a file; "
            "probe without resume"
        )

    rows = [
        {
            "args": encode(tuple(call.args)),
            "kwargs": encode(call.kwargs),
            "origin": call.origin,
            "trajectories": call.trajectories,
            "clean": encode(call.clean),
        }
        for call in calls
    ]
    return tensors, json.dumps(rows)


def decode_calls(tensors: Sequence[Tensor], text: str) -> list[Call]:
    """Decodes calls from the tensors and the text of `encode_calls`."""

    def decode(encoded: dict[str, Any]) -> Any:
        ((kind, value),) = encoded.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "plain":
            return value
        if kind == "dict":
            return {key: decode(item) for key, item in value.items()}
        items = [decode(item) for item in value]
        return tuple(items) if kind == "tuple" else items

    return [
        Call(
            decode(row["args"]),
            decode(row["kwargs"]),
            row["origin"],
            tuple(row.get("trajectories", ())),
            decode(row["clean"]) if "clean" in row else None,
        )
        for row in json.loads(text)
    ]
