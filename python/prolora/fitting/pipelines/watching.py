"""What a pipeline is seen to do in a sampling: calls of its denoiser, steps of its scheduler."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..sides import Call, output_of
from ..updates import temporary_hooks
from .conditioning import CallParts, split_call

Until = Literal["call", "step", "end"]
"""When a sampling ends: at the denoiser's first call, the scheduler's first step, or by itself."""


class SamplingEnded(Exception):
    """Ends a sampling of which enough was seen."""


@dataclass(frozen=True)
class Step:
    """One step of a scheduler."""

    calls: list[tuple[CallParts, Tensor]]  # of the denoiser since the step before, and its outputs
    given: Tensor  # as the prediction: one of the outputs, or a sum of them
    time: float  # as the scheduler counts


@dataclass
class Sampling:
    """One sampling, as far as it went."""

    calls: list[CallParts] = field(default_factory=list)  # of the denoiser
    steps: list[Step] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # after each step


@contextmanager
def watch_sampling(denoiser: nn.Module, scheduler: Any, until: Until = "end") -> Iterator[Sampling]:
    """Yields what a pipeline does within the block, which also ends where it was seen enough."""
    seen, asked = Sampling(), list[tuple[CallParts, Tensor]]()
    step, patched = scheduler.step, vars(scheduler).get("step")  # also inside another such block

    def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parts = split_call(model, Call(args, kwargs))
        seen.calls.append(replace(parts, latent=parts.latent.detach().clone()))
        if until == "call":
            raise SamplingEnded

    def after(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
        asked.append((seen.calls[-1], output_of(output).detach().clone()))

    @functools.wraps(step)  # pipelines look at its parameters
    def watched(given: Tensor, time: Any, *args: Any, **kwargs: Any) -> Any:
        count = float(torch.as_tensor(time).double().mean())
        seen.steps.append(Step([*asked], given.detach().clone(), count))
        asked.clear()
        if until == "step":
            raise SamplingEnded
        result = step(given, time, *args, **kwargs)
        seen.latents.append(result[0].detach())
        return result

    hooks = (
        denoiser.register_forward_pre_hook(before, with_kwargs=True),
        denoiser.register_forward_hook(after, with_kwargs=True),
    )
    scheduler.step = watched
    try:
        with temporary_hooks(hooks), suppress(SamplingEnded):
            yield seen
    finally:
        if patched is None:
            del scheduler.step
        else:
            scheduler.step = patched
