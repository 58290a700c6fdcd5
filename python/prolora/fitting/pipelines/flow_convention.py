"""A flow pipeline's times and sign, seen on one short sampling.

Schedulers of flows state their noise level, but pipelines differ in what they make of it: FLUX is
given the level u, SD3 1000·u, Lumina and Z-Image 1 − u, and the latter two predict x₀ − ε instead
of ε − x₀. No configuration says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...errors import UnsupportedFormat
from .schedules import NoiseSchedule, Times
from .watching import Step

STEPS = 3
"""Sampling steps that are observed."""
_TOLERANCE = 0.01  # share of the range of times; pipelines round them to half precision
_USUAL = ((1.0, 0.0), (-1.0, 1.0))  # slope and offset of times, in units of 1 or of the scheduler


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
