"""A flow pipeline's times and sign, seen on one short sampling.

Schedulers of flows state their noise level, but pipelines differ in what they make of it: FLUX is
given the level u, SD3 1000·u, Lumina and Z-Image 1 − u, and the latter two predict x₀ − ε instead
of ε − x₀. No configuration says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedFormat
from ..sides import Call, output_of
from ..updates import temporary_hooks
from .conditioning import split_call
from .schedules import NoiseSchedule, Times

STEPS = 3
"""Sampling steps that are observed."""
_TOLERANCE = 0.01  # share of the range of times; pipelines round them to half precision
_USUAL = ((1.0, 0.0), (-1.0, 1.0))  # slope and offset of times, in units of 1 or of the scheduler


def observe_flow(
    schedule: NoiseSchedule,  # as read from the scheduler
    scheduler: Any,  # of the pipeline
    denoiser: nn.Module,  # of the pipeline
    sample: Callable[[], None],  # runs the pipeline from noise, in STEPS steps
    name: str,  # of the pipeline, for messages
) -> NoiseSchedule:
    """Returns the schedule of a flow with its times and its sign."""
    asked: list[Tensor] = []  # the model's times in a step, and its predictions
    outputs: list[Tensor] = []
    times: list[tuple[float, float]] = []  # the model's and the scheduler's of each step
    signs: list[float] = []

    def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        asked.append(split_call(model, Call(args, kwargs)).time.double().mean())
        outputs.append(output_of(out).detach().double().cpu())

    def end_step(used: Tensor, time: Any) -> None:
        if outputs:
            times.append((float(asked[-1]), float(torch.as_tensor(time).double().mean())))
            signs.append(_sum_of_shares(used.detach().double().cpu(), outputs))
        outputs.clear()

    hook = denoiser.register_forward_hook(record, with_kwargs=True)
    with temporary_hooks([hook]), watch_steps(scheduler, end_step):
        sample()
    if not times:
        raise UnsupportedFormat(
            f"{name}: its scheduler {type(scheduler).__name__} was never stepped, so the noise "
            "level of its calls is unknown"
        )
    sign = _read_sign(signs, name) * schedule.sign
    return replace(schedule, times=_fit_times(schedule, times, name), sign=sign)


@contextmanager
def watch_steps(
    scheduler: Any,  # of a pipeline
    on_step: Callable[[Tensor, Any], None] | None = None,
    on_result: Callable[[Tensor], object] | None = None,  # called with the latents after the step
) -> Iterator[None]:
    """Calls functions at every step of a scheduler, also inside another such block."""
    step, before = scheduler.step, vars(scheduler).get("step")

    @functools.wraps(step)  # pipelines look at its parameters
    def watched(model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        if on_step:
            on_step(model_output, timestep)
        result = step(model_output, timestep, *args, **kwargs)
        if on_result:
            on_result(result[0])
        return result

    scheduler.step = watched
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before


def _sum_of_shares(used: Tensor, outputs: list[Tensor]) -> float:
    """Fits used ≈ Σ w·output over guidance branches; returns Σ w, 1 or −1."""
    size = used.numel()
    branches = [part for o in outputs if o.numel() % size == 0 for part in o.reshape(-1, size)]
    if not branches:
        return 0.0
    matrix = torch.stack(branches, 1)
    return float(torch.linalg.lstsq(matrix, used.reshape(-1, 1), driver="gelsd").solution.sum())


def _read_sign(shares: list[float], name: str) -> int:
    mean = sum(shares) / len(shares)
    if abs(mean) < 0.2 or any(share * mean < 0 for share in shares):
        raise UnsupportedFormat(
            f"{name}: what its pipeline gives to the scheduler is not a multiple of the model's "
            "predictions, so they cannot be converted"
        )
    return 1 if mean > 0 else -1


def _fit_times(schedule: NoiseSchedule, times: list[tuple[float, float]], name: str) -> Times:
    """Finds the slope and offset of the model's time over the noise level."""
    asked = torch.tensor([pair[0] for pair in times], dtype=torch.float64)
    level = torch.tensor([pair[1] for pair in times], dtype=torch.float64) / schedule.unit
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
