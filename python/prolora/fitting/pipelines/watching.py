"""Samplings that are observed: calls of the denoiser, steps of the scheduler.

No configuration says what a pipeline makes of times, predictions and guidance scales. FLUX is given
the noise level u, SD3 1000·u, Lumina and Z-Image 1 − u, and the latter two predict x₀ − ε instead
of ε − x₀. A guidance scale of 1 is none in most, 0 in Z-Image.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import UnsupportedFormat
from ..sides import Call, output_of
from ..updates import temporary_hooks
from .conditioning import CallParts, split_call
from .schedules import NoiseSchedule, Times

FLOW_STEPS = 3
"""Sampling steps in which the convention of a flow is seen."""
_TOLERANCE = 0.01  # share of the range of times; pipelines round them to half precision
_USUAL = ((1.0, 0.0), (-1.0, 1.0))  # slope and offset of times, in units of 1 or of the scheduler
_ALIKE = 1e-4
"""Predictions with and without the prompt that differ by less say nothing about a scale."""
_LEFT = 0.02
"""Share of the guided prediction that is no sum of both at most."""

Until = Literal["call", "step", "end"]
"""When a sampling ends: at the denoiser's first call, the scheduler's first step, or by itself."""


class SamplingEnded(Exception):
    """Ends a sampling before its last step."""


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
    """Records the sampling within the block, which it may end early."""
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


def read_flow(schedule: NoiseSchedule, steps: Sequence[Step], name: str) -> NoiseSchedule:
    """Returns the schedule of a flow with its times and its sign; `name` is for messages."""
    steps = [step for step in steps if step.calls]
    if not steps:
        raise UnsupportedFormat(
            f"{name}: its scheduler was never stepped, so the noise level of its calls is unknown"
        )
    shares = [_sum_of_shares(step) for step in steps]
    mean = sum(shares) / len(shares)
    if abs(mean) < 0.2 or any(share * mean < 0 for share in shares):
        raise UnsupportedFormat(
            f"{name}: what its pipeline gives to the scheduler is not a multiple of the model's "
            "predictions, so they cannot be converted"
        )
    sign = (1 if mean > 0 else -1) * schedule.sign
    return replace(schedule, times=_fit_times(schedule, steps, name), sign=sign)


def _sum_of_shares(step: Step) -> float:
    """Fits given ≈ Σ w·output over guidance branches; returns Σ w, 1 or −1."""
    given, size = step.given.double().cpu(), step.given.numel()
    outputs = [output.double().cpu() for _, output in step.calls]
    branches = [part for o in outputs if o.numel() % size == 0 for part in o.reshape(-1, size)]
    if not branches:
        return 0.0
    matrix = torch.stack(branches, 1)
    return float(torch.linalg.lstsq(matrix, given.reshape(-1, 1), driver="gelsd").solution.sum())


def _fit_times(schedule: NoiseSchedule, steps: Sequence[Step], name: str) -> Times:
    """Finds the slope and offset of the model's time over the noise level."""
    asked = torch.stack([step.calls[-1][0].time.double().mean().cpu() for step in steps])
    level = torch.tensor([step.time for step in steps], dtype=torch.float64) / schedule.unit
    for unit in (1.0, schedule.unit):
        for slope, offset in _USUAL:
            usual = Times(slope * unit, offset * unit)
            error = asked - usual.slope * level - usual.offset
            if float(error.abs().max()) < _TOLERANCE * unit:
                return usual
    raise UnsupportedFormat(
        f"{name}: the times that its pipeline gives to the model are not the noise level of its "
        "scheduler, counted from either end, so other models cannot be asked at the same one"
    )


def read_guidance_scale(
    used: Tensor, with_prompt: Sequence[Tensor], without: Sequence[Tensor]
) -> float | None:
    """Reads the scale of used = ±(u + g·(c − u))."""
    if not with_prompt or not without:
        return 1.0
    prompted, free = with_prompt[0], without[0]
    if float((prompted - free).norm()) < _ALIKE * float(prompted.norm()):
        return 1.0
    given = used.flatten()[: prompted.numel()]
    branches = torch.stack([prompted, free], 1)
    weights = torch.linalg.lstsq(branches, given[:, None], driver="gelsd").solution[:, 0]
    total = float(weights.sum())
    left = float((branches @ weights - given).norm())
    if abs(total) < 0.5 or left > _LEFT * float(given.norm()):
        return None
    return float(weights[0]) / total
