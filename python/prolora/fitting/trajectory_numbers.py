"""Which samples of recorded calls lie on one trajectory: they are not independent evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .energies import latent_of
from .recording.trajectories import Call
from .recording.translation import Question

SAME_TRAJECTORY = 0.5
"""Cosine of two latents of one trajectory, one step apart, is larger; fresh noise has about 0."""


def number_questions(questions: Sequence[Question]) -> list[Question]:
    """Numbers the trajectory of every sample of questions in recorded order.

    Numbered ones are left as they are.
    """
    if all(question.target.trajectories for question in questions):
        return list(questions)
    numbers = number_trajectories([question.target for question in questions])
    return [
        Question(replace(question.source, trajectories=n), replace(question.target, trajectories=n))
        for question, n in zip(questions, numbers, strict=True)
    ]


def number_trajectories(calls: Sequence[Call]) -> list[tuple[int, ...]]:
    """Numbers the trajectory of every sample of every call.

    A sampler changes a latent little from one call to the next. So a sample continues the one of
    the call before that its latent resembles most, and starts a trajectory if there is none. The
    two branches of the guidance have one latent, and are one trajectory. Calls come in the order in
    which they were recorded, origin by origin.
    """
    numbered: list[tuple[int, ...]] = []
    count = 0
    before: Tensor | None = None
    origin = ""
    for call in calls:
        now = _directions(call)
        if before is None or call.origin != origin or before.shape[1] != now.shape[1]:
            before = now[:0]  # another sampler: nothing goes on
        rows: list[int] = []
        for i in range(len(now)):
            twins = (now[:i] @ now[i] > 1 - 1e-6).nonzero()
            near = before @ now[i]
            if len(twins):
                rows.append(rows[int(twins[0])])
            elif len(near) and float(near.max()) > SAME_TRAJECTORY:
                rows.append(numbered[-1][int(near.argmax())])
            else:
                rows.append(count)
                count += 1
        before, origin = now, call.origin
        numbered.append(tuple(rows))
    return numbered


def _directions(call: Call) -> Tensor:
    """Returns the latents of a call as unit rows [n, size], float32 on the CPU."""
    latent = latent_of(call)
    flat = torch.ones(1, 1) if latent is None else latent.detach().float().flatten(1).cpu()
    return nn.functional.normalize(flat, dim=1)


def sum_by_trajectory(calls: Sequence[Call], values: Sequence[Tensor]) -> Tensor:
    """Sums the samples' values over each trajectory [number of trajectories].

    A call without numbers is one trajectory; `values` has one for every sample of every call, [n]
    each.
    """
    sums: dict[object, float] = {}
    for i, (call, value) in enumerate(zip(calls, values, strict=True)):
        numbered = len(call.trajectories) == len(value)
        for row, part in enumerate(value.tolist()):
            key: object = call.trajectories[row] if numbered else ("call", i)
            sums[key] = sums.get(key, 0.0) + part
    return torch.tensor(list(sums.values()), dtype=torch.float64)
