"""A denoiser's calls taken apart: latent, time, and what it is told of the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ProLoRAError
from .trajectories import Call

Path = tuple[str, ...]
Conditioning = dict[Path, Any]
"""What a call says besides latent and time, nested arguments by their path."""

# Positions of tokens: one table for the whole batch.
_SHARED = ("img_ids", "txt_ids")
_TOLERANCE = 1e-3  # of a squared norm: text encoders round otherwise in a batch of another size


@dataclass(frozen=True)
class CallParts:
    """One call of a denoiser.

    Attributes:
        latent: [n, ...].
        time: [] or [n].
        told: everything else.
    """

    latent: Tensor
    time: Tensor
    told: Conditioning


def split_call(model: nn.Module, call: Call) -> CallParts:
    """A call taken apart by the names in the model's `forward`.

    Raises:
        ProLoRAError: the model takes no time step.
    """
    given = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    names = list(given)
    latent = given.pop(names[0])
    if "timestep" not in given:
        raise ProLoRAError(f"{type(model).__name__} takes no timestep; probing needs a denoiser")
    time = torch.as_tensor(given.pop("timestep"), device=latent.device)
    return CallParts(latent, time, _flatten_nested(given))


def build_call(model: nn.Module, found: CallParts) -> Call:
    """A call of the model with those parts."""
    first = next(iter(inspect.signature(model.forward).parameters))
    kwargs: dict[str, Any] = {first: found.latent, "timestep": found.time}
    for path, value in found.told.items():
        inner = kwargs
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return Call((), kwargs)


def _flatten_nested(values: Mapping[str, Any], above: Path = ()) -> Conditioning:
    found: Conditioning = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flatten_nested(value, (*above, name))
        else:
            found[(*above, name)] = value
    return found


def _by_sample(path: Path, value: Any, count: int) -> bool:
    """Whether a value has a row for every sample of the call."""
    return (
        isinstance(value, Tensor)
        and value.dim() > 0
        and len(value) == count
        and path[-1] not in _SHARED
    )


def sample_conditioning(found: CallParts, i: int) -> Conditioning:
    """What sample i of a call is told, as in a call of one sample."""
    count = len(found.latent)
    return {
        path: value[i : i + 1] if _by_sample(path, value, count) else value
        for path, value in found.told.items()
    }


def stack_conditionings(rows: Sequence[Conditioning]) -> Conditioning:
    """One call's worth of what several samples are told.

    Raises:
        ProLoRAError: texts of two lengths.
    """
    found: Conditioning = {}
    for path, value in rows[0].items():
        values = [other[path] for other in rows]
        if not _by_sample(path, value, 1):
            found[path] = value
        elif len({v.shape for v in values}) > 1:
            raise ProLoRAError(
                f"{'.'.join(path)} has another length for each prompt, so that two prompts cannot "
                "go into one call; probe with a single prompt and --probe-guidance 1"
            )
        else:
            found[path] = torch.cat(values)
    return found


class PromptTable:
    """What one model is told for each prompt, and without any: the same order for both models."""

    def __init__(self, model: nn.Module, entries: Sequence[Conditioning], time: Tensor) -> None:
        """`entries` by prompt, the unconditional one last; `time` as the pipeline gives it."""
        self.model, self.entries = model, list(entries)
        self.time = time
        self._told: dict[tuple[int, ...], Conditioning] = {}

    def prompt_of(self, found: CallParts, i: int) -> int:
        """Which entry sample i was told.

        Raises:
            ProLoRAError: none of them.
        """
        told = sample_conditioning(found, i)
        distances = [_conditioning_distance(told, entry) for entry in self.entries]
        best = min(range(len(distances)), key=lambda k: distances[k])
        if distances[best] > _TOLERANCE:
            raise ProLoRAError(
                f"a call of {type(self.model).__name__} was told what belongs to no prompt of this "
                "probing; its pipeline changes the text embeddings between steps, which probing "
                "cannot translate"
            )
        return best

    def call(self, latent: Tensor, time: Tensor, prompts: Sequence[int]) -> Call:
        """The model asked about latents [n, ...] at a time [] or [n], one prompt a sample."""
        if tuple(prompts) not in self._told:
            self._told[tuple(prompts)] = stack_conditionings([self.entries[k] for k in prompts])
        told = self._told[tuple(prompts)]  # one copy for all steps of an image
        if not (time.is_floating_point() and bool((time != time.round()).any())):
            time = time.to(self.time.dtype)  # a fraction stays one
        elif self.time.is_floating_point():
            time = time.to(self.time.dtype)
        else:
            time = time.float()
        if self.time.dim() and not time.dim():
            time = time.expand(len(latent))
        if not self.time.dim() and time.dim() and bool((time == time[0]).all()):
            time = time[0]
        return build_call(self.model, CallParts(latent, time, told))


def _conditioning_distance(a: Conditioning, b: Conditioning) -> float:
    """Mean of ‖x − y‖²/(‖x‖² + ‖y‖²) over the tensors with a row for each sample."""
    found = []
    for path, x in a.items():
        y = b.get(path)
        if not _by_sample(path, x, 1):
            continue
        if not isinstance(y, Tensor) or x.shape != y.shape:
            return float("inf")
        x, y = x.double(), y.double().to(x.device)
        whole = float(x.square().sum() + y.square().sum())
        found.append(float((x - y).square().sum()) / whole if whole else 0.0)
    return max(found, default=0.0)
