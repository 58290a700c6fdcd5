"""Energies of predictions by sample and trajectory, and how far bases differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .recording.trajectories import Call
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
