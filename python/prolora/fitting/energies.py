"""Energies of predictions by sample and image, and how far bases differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .probes import Probe


def energy_of(part: Tensor) -> Tensor:
    """Computes ‖part‖² of every sample: [n, …] -> [n], in float64 on the CPU."""
    return part.detach().double().flatten(1).square().sum(1).cpu()


def share_by_origin(probes: Sequence[Probe], missing: Sequence[Tensor]) -> dict[str, float]:
    """Computes 1 − Σ‖achieved − wanted‖²/Σ‖wanted‖² by origin, and over all.

    `probes` are batches of one origin each; `missing` is ‖achieved − wanted change‖² of every
    sample of every batch.
    """
    shares = {}
    for origin in (*dict.fromkeys(probe.origin for probe in probes), "all"):
        top = bottom = 0.0
        for probe, part in zip(probes, missing, strict=True):
            if origin in (probe.origin, "all"):
                top += float(part.sum())
                bottom += float(energy_of(probe.change).sum())
        shares[origin] = 1 - top / max(bottom, 1e-30)
    return shares


def measure_disagreement(probes: Sequence[Probe]) -> dict[str, float]:
    """Measures how far the bases' own predictions are apart, by origin and overall.

    It is the mean over samples of ‖v_t − v_s‖² over the mean of ‖r_t‖² and ‖r_s‖², r what is left
    of a prediction v without its component along the latent. So it does not depend on the LoRA.
    Since predictions of noise, velocity and image turn into each other by adding a multiple of the
    latent and scaling, it is the same number for all of them. 0 means the same predictions, 2
    predictions that have nothing in common.
    """
    rows: dict[str, list[Tensor]] = {}
    for probe in probes:
        ratio = _disagree_by_sample(probe)
        for origin in (probe.origin, "all"):
            rows.setdefault(origin, []).append(ratio)
    return {origin: float(torch.cat(parts).mean()) for origin, parts in rows.items()}


def _disagree_by_sample(probe: Probe) -> Tensor:
    """Divides ‖v_t − v_s‖² by the two predictions' mean energy beside the latent [n]."""
    latent = probe.target
    own, other = probe.plain, probe.plain - probe.difference
    energies = [_energy_beside(prediction, latent) for prediction in (own, other)]
    return energy_of(probe.difference) / ((energies[0] + energies[1]) / 2).clamp_min(1e-30)


def _energy_beside(prediction: Tensor, latent: Tensor) -> Tensor:
    """Returns a prediction's energy without its component along a latent of its shape."""
    if latent.shape != prediction.shape:
        return energy_of(prediction)
    x = latent.detach().double().flatten(1).cpu()
    v = prediction.detach().double().flatten(1).cpu()
    along = (v * x).sum(1) / x.square().sum(1).clamp_min(1e-30)
    return (v - along[:, None] * x).square().sum(1)


def sum_by_image(probes: Sequence[Probe], values: Sequence[Tensor]) -> Tensor:
    """Sums the samples' values over each sampled image [number of images].

    `values` has one for every sample of every probe, [n] each.
    """
    sums: dict[int, float] = {}
    for probe, value in zip(probes, values, strict=True):
        for number, part in zip(probe.numbers, value.tolist(), strict=True):
            sums[number] = sums.get(number, 0.0) + part
    return torch.tensor(list(sums.values()), dtype=torch.float64)
