"""Energies of predictions by sample and trajectory, and how far bases differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .recording.trajectories import Call
from .recording.translation import Question
from .recording.wanted import WantedChange


def energy_of(part: Tensor) -> Tensor:
    """Computes ‖part‖² of every sample: [n, …] -> [n], in float64 on the CPU."""
    return part.detach().double().flatten(1).square().sum(1).cpu()


def share_by_origin(probes: Sequence[WantedChange], missing: Sequence[Tensor]) -> dict[str, float]:
    """Computes 1 − Σ‖achieved − wanted‖²/Σ‖wanted‖² by origin, and over all.

    `probes` are batches of one origin each; `missing` is ‖achieved − wanted change‖² of every
    sample of every batch.
    """
    shares = {}
    for origin in (*dict.fromkeys(wanted.call.origin for wanted in probes), "all"):
        top = bottom = 0.0
        for wanted, part in zip(probes, missing, strict=True):
            if origin in (wanted.call.origin, "all"):
                top += float(part.sum())
                bottom += float(energy_of(wanted.change).sum())
        shares[origin] = 1 - top / max(bottom, 1e-30)
    return shares


def measure_disagreement(probes: Sequence[WantedChange]) -> dict[str, float]:
    """Measures how far the bases' own predictions are apart, by origin and overall.

    It is the mean over samples of ‖v_t − v_s‖² over the mean of ‖r_t‖² and ‖r_s‖², r what is left
    of a prediction v without its component along the latent. So it does not depend on the LoRA.
    Since predictions of noise, velocity and image turn into each other by adding a multiple of the
    latent and scaling, it is the same number for all of them. 0 means the same predictions, 2
    predictions that have nothing in common.
    """
    rows: dict[str, list[Tensor]] = {}
    for wanted in probes:
        ratio = _disagree_by_sample(wanted)
        for origin in (wanted.call.origin, "all"):
            rows.setdefault(origin, []).append(ratio)
    return {origin: float(torch.cat(parts).mean()) for origin, parts in rows.items()}


def latent_of(call: Call) -> Tensor | None:
    """Returns the latents of a call: its first tensor with two axes or more."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return value
    return None


def _disagree_by_sample(wanted: WantedChange) -> Tensor:
    """Divides ‖v_t − v_s‖² by the two predictions' mean energy beside the latent [n]."""
    latent = latent_of(wanted.call)
    own, other = wanted.plain, wanted.plain - wanted.base_difference
    energies = [_energy_beside(prediction, latent) for prediction in (own, other)]
    return energy_of(wanted.base_difference) / ((energies[0] + energies[1]) / 2).clamp_min(1e-30)


def _energy_beside(prediction: Tensor, latent: Tensor | None) -> Tensor:
    """Returns a prediction's energy without its component along a latent of its shape."""
    if latent is None or latent.shape != prediction.shape:
        return energy_of(prediction)
    x = latent.detach().double().flatten(1).cpu()
    v = prediction.detach().double().flatten(1).cpu()
    along = (v * x).sum(1) / x.square().sum(1).clamp_min(1e-30)
    return (v - along[:, None] * x).square().sum(1)


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
