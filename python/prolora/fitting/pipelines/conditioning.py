"""A denoiser's calls, split into latent, time and conditioning, and rebuilt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ProLoRAError
from ..sides import Call, output_of

Path = tuple[str, ...]
Conditioning = dict[Path, Any]
"""The arguments of a call besides latent and time; nested ones by their path."""

# Positions of tokens: one table for all samples of a batch.
_SHARED = ("img_ids", "txt_ids")
_TIMES = ("timestep", "timesteps", "t")  # what denoisers call the time
_TOLERANCE = 1e-3  # share of a squared norm: text encoders round differently by batch size


@dataclass(frozen=True)
class CallParts:
    """The parts of one call of a denoiser."""

    latent: Tensor  # [n, ...]
    time: Tensor  # [] or [n]
    conditioning: Conditioning  # all other arguments
    listed: bool = False  # the model takes a list of latents, one for each sample


def split_call(model: nn.Module, call: Call) -> CallParts:
    """Splits a call by the parameter names of the model's `forward`."""
    arguments = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    arguments |= arguments.pop("kwargs", {})
    latent = arguments.pop(next(iter(arguments)))
    listed = isinstance(latent, list)
    if listed and len({x.shape if isinstance(x, Tensor) else x for x in latent}) == 1:
        latent = torch.stack(latent)
    name = _time_name(model)
    if name not in arguments or not isinstance(latent, Tensor):
        raise ProLoRAError(
            f"{type(model).__name__} takes no timestep and latents of one size; a fit needs a "
            "denoiser"
        )
    time = torch.as_tensor(arguments.pop(name), device=latent.device)
    return CallParts(latent, time, _flatten_nested(arguments), listed)


def _time_name(model: nn.Module) -> str:
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _TIMES if name in parameters), _TIMES[0])


def build_call(model: nn.Module, parts: CallParts) -> Call:
    """Builds a call of the model from its parts."""
    first = next(iter(inspect.signature(model.forward).parameters))
    latent = list(parts.latent.unbind()) if parts.listed else parts.latent
    kwargs: dict[str, Any] = {first: latent, _time_name(model): parts.time}
    for path, value in parts.conditioning.items():
        inner = kwargs
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return Call((), kwargs)


def make_reader(*latents: Tensor) -> Callable[[Any], Tensor]:
    """Makes the reader of models with these latents.

    It leaves out the variance that DiT and PixArt also predict.
    """
    channels = next((x.shape[1] for x in latents if x.dim() == 4), None)

    def read(result: Any) -> Tensor:
        output = output_of(result)
        return output[:, :channels] if output.dim() == 4 else output

    return read


def _flatten_nested(values: Mapping[str, Any], above: Path = ()) -> Conditioning:
    flat: Conditioning = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten_nested(value, (*above, name))
        else:
            flat[(*above, name)] = value
    return flat


def _has_row_per_sample(path: Path, value: Any, count: int) -> bool:
    """Returns whether a value has a row or an item for every sample."""
    if isinstance(value, list):
        return len(value) == count
    return (
        isinstance(value, Tensor)
        and value.dim() > 0
        and len(value) == count
        and path[-1] not in _SHARED
    )


def sample_conditioning(parts: CallParts, i: int) -> Conditioning:
    """Returns the conditioning of sample i, as in a call of that sample alone."""
    count = len(parts.latent)
    return {
        path: value[i : i + 1] if _has_row_per_sample(path, value, count) else value
        for path, value in parts.conditioning.items()
    }


def stack_conditionings(rows: Sequence[Conditioning]) -> Conditioning:
    """Stacks the conditioning of several samples for one call."""
    stacked: Conditioning = {}
    for path, value in rows[0].items():
        values = [other[path] for other in rows]
        if not _has_row_per_sample(path, value, 1):
            stacked[path] = value
        elif isinstance(value, list):
            stacked[path] = [item for v in values for item in v]
        elif len({v.shape for v in values}) > 1:
            raise ProLoRAError(
                f"{'.'.join(path)} has a different length for each prompt, so that one call cannot "
                "hold two prompts; probe with a single prompt, without guidance"
            )
        else:
            stacked[path] = torch.cat(values)
    return stacked


@dataclass(frozen=True)
class PromptTable:
    """One model's conditioning for each prompt and, at last, for none."""

    model: nn.Module
    entries: list[Conditioning]  # by prompt, the unconditional one last
    like: CallParts  # of a call of the pipeline
    guided: bool  # the pipeline asks its model with and without the prompt

    def has_prompt(self, parts: CallParts, i: int) -> bool:
        """Returns whether sample i of a call has a prompt.

        Some prompts are close to none: texts whose first token outweighs all others. So what counts
        is the nearest entry, and none where two are as near.
        """
        conditioning = sample_conditioning(parts, i)
        free = conditioning_distance(conditioning, self.entries[-1])
        if free == 0 or free > _TOLERANCE:
            return free > 0
        return any(conditioning_distance(conditioning, e) < free for e in self.entries[:-1])

    def build_call(self, latent: Tensor, time: Tensor, prompts: Sequence[int]) -> Call:
        """Builds a call of the model; times [n] get the pipeline's dtype."""
        conditioning = stack_conditionings([self.entries[k] for k in prompts])
        # A fraction must not become an integer.
        dtype, is_fraction = self.like.time.dtype, bool((time != time.round()).any())
        time = time.float() if is_fraction and not dtype.is_floating_point else time.to(dtype)
        return build_call(self.model, CallParts(latent, time, conditioning, self.like.listed))


def conditioning_distance(a: Conditioning, b: Conditioning) -> float:
    """Returns the largest ‖x − y‖²/(‖x‖² + ‖y‖²) of tensors with rows by sample."""
    distances = []
    for path, x in a.items():
        y = b.get(path)
        if not _has_row_per_sample(path, x, 1):
            continue
        if isinstance(x, list) and isinstance(y, list):
            x, y = (value[0] for value in (x, y))
            if not isinstance(x, Tensor):
                continue
        if not isinstance(y, Tensor) or x.shape != y.shape:
            return float("inf")
        x, y = x.double(), y.double().to(x.device)
        size = float(x.square().sum() + y.square().sum())
        distances.append(float((x - y).square().sum()) / size if size else 0.0)
    return max(distances, default=0.0)
