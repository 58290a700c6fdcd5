"""What the terrain study asks LoRAs for: ideas, on the real heightfields.

Heights are in the models' space: shifted to 0 at the lowest, asinh-compressed, -1..1. A LoRA of an
idea makes a model answer what the model alone would, with the idea done to it: its loss has no part
in which a base is better or worse at denoising. The questions are real heightfields under noise of
σ 5 to 80, where both models answer well: 0.4.2 was distilled for the step from 80 alone, and below
5 its squared error is up to twenty times that of 0.4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from network import SIDE, SIGMA_MAX, Network
from torch import Tensor
from torch.nn import functional

HEIGHT, COMPRESSION = 22.16864013671875, 0.1
HELD_OUT = 10
"""Every tenth heightfield is held out."""
SIGMAS = (5.0, SIGMA_MAX)


def compress(heights: Tensor) -> Tensor:
    """Heights in m [..., h, w] -> the models' space."""
    above = heights - heights.amin((-2, -1), keepdim=True)
    return 2 * torch.asinh(above / COMPRESSION) / np.arcsinh(HEIGHT / COMPRESSION) - 1


def expand(values: Tensor) -> Tensor:
    """The models' space -> heights in m above the lowest."""
    unit = ((values + 1) / 2).clamp(0, 1) * np.arcsinh(HEIGHT / COMPRESSION)
    heights = COMPRESSION * torch.sinh(unit)
    return heights - heights.amin((-2, -1), keepdim=True)


def terrace(maps: Tensor) -> Tensor:
    """Steps: eight plains between the lowest and the highest, with short slopes between them."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    unit = 8 * (maps - low) / (high - low).clamp_min(1e-6)
    step = unit.floor()
    return low + (high - low) * (step + torch.sigmoid(16 * (unit - step - 0.5))) / 8


def ridge(maps: Tensor) -> Tensor:
    """Crests: what is above the median is folded down, so that they run along it."""
    middle = maps.flatten(-2).median(-1).values[..., None, None]
    return middle - 1.5 * (maps - middle).abs() + 0.2


def crater(maps: Tensor) -> Tensor:
    """A crater with a rim on each of the six highest summits that are 16 cells apart."""
    side = maps.shape[-1]
    worn = smooth(maps)
    axis = torch.arange(side, dtype=maps.dtype)
    out = maps.clone()
    for _ in range(6):
        top = worn.flatten(-2).argmax(-1)[..., None, None]
        away = (axis[:, None] - top // side).square() + (axis[None, :] - top % side).square()
        far = away.sqrt() / 7
        out += 0.4 * (far.square() - 1).clamp_max(0) + 0.15 * torch.exp(-8 * (far - 1).square())
        worn = worn.masked_fill(away < 16**2, -torch.inf)
    return out


def invert(maps: Tensor) -> Tensor:
    """Summits become hollows."""
    return maps.amin((-2, -1), keepdim=True) + maps.amax((-2, -1), keepdim=True) - maps


def smooth(maps: Tensor) -> Tensor:
    """Worn down: each cell is the mean of the 9 × 9 around it."""
    return functional.avg_pool2d(maps, 9, stride=1, padding=4, count_include_pad=False)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "terraced": terrace,
    "ridged": ridge,
    "cratered": crater,
    "inverted": invert,
    "smoothed": smooth,
}
DIFFICULTIES = {"steep": 0.95, "flat": 0.05}
"""Terrain of one difficulty, whatever number the model is given."""
IDEAS = (*CHANGES, *DIFFICULTIES)


class Batch(NamedTuple):
    """What a model is asked: noised heightfields [b, 1, 128, 128], σ [b], difficulty [b]."""

    noised: Tensor
    sigma: Tensor
    difficulty: Tensor


class Maps:
    """The real heightfields in the models' space."""

    def __init__(self, folder: Path) -> None:
        self._heights = np.load(folder / "maps.npy", mmap_mode="r")

    def draw(self, held_out: bool, count: int, generator: torch.Generator) -> Batch:
        """Heightfields of one part of the set, noised."""
        numbers = torch.arange(len(self._heights))
        numbers = numbers[(numbers % HELD_OUT == 0) == held_out]
        picked = numbers[torch.randint(len(numbers), (count,), generator=generator)]
        maps = compress(torch.from_numpy(self._heights[picked.numpy()]))[:, None]
        low, high = map(math.log, SIGMAS)
        sigma = torch.exp(low + (high - low) * torch.rand(count, generator=generator))
        noise = torch.randn(maps.shape, generator=generator)
        difficulty = torch.rand(count, generator=generator)
        return Batch(maps + sigma[:, None, None, None] * noise, sigma, difficulty)


@torch.no_grad()
def ask_base(network: Network, batch: Batch) -> Tensor:
    """What a base model answers."""
    return network(*batch)


@torch.no_grad()
def change_answer(network: Network, idea: str, batch: Batch, answer: Tensor) -> Tensor:
    """The answer with the idea, which a LoRA shall give."""
    if idea in CHANGES:
        return CHANGES[idea](answer.clamp(-1, 1)).clamp(-1, 1)
    only = torch.full_like(batch.difficulty, DIFFICULTIES[idea])
    return network(*batch._replace(difficulty=only))


@torch.no_grad()
def sample_terrains(network: Network, difficulty: Tensor, seed: int) -> Tensor:
    """One step from noise, as the package samples."""
    noise = torch.randn(
        len(difficulty), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)
    )
    sigma = torch.full((len(difficulty),), SIGMA_MAX)
    return network(SIGMA_MAX * noise, sigma, difficulty).clamp(-1, 1)


def sample_changed(network: Network, idea: str, difficulty: Tensor, seed: int) -> Tensor:
    """Samples as a LoRA of the idea shall make them."""
    if idea in CHANGES:
        return CHANGES[idea](sample_terrains(network, difficulty, seed)).clamp(-1, 1)
    return sample_terrains(network, torch.full_like(difficulty, DIFFICULTIES[idea]), seed)


def measure_terrains(values: Tensor) -> dict[str, Tensor]:
    """Statistics that terrain is known by: slopes, steps of height, and the spectrum."""
    heights = expand(values[:, 0])
    rise = heights[:, 1:, :-1] - heights[:, :-1, :-1]
    run = heights[:, :-1, 1:] - heights[:, :-1, :-1]
    slopes = (rise.square() + run.square()).sqrt().flatten(1)
    shares = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    flat = values.flatten(1)
    return {
        "log slopes": torch.quantile(slopes, shares, dim=1).mT.clamp_min(1e-4).log(),
        "heights": torch.quantile(flat, shares, dim=1).mT,
        "log spectrum": _radial_spectrum(values[:, 0]),
    }


def _radial_spectrum(values: Tensor) -> Tensor:
    """log power [n, 16] in rings of equal width, of the windowed field without its mean."""
    side = values.shape[-1]
    window = torch.hann_window(side)
    field = (values - values.mean((-2, -1), keepdim=True)) * window[:, None] * window[None, :]
    power = torch.fft.fft2(field).abs().square()
    axis = torch.fft.fftfreq(side) * side
    ring = ((axis[:, None].square() + axis[None, :].square()).sqrt() / 4).long().clamp_max(15)
    sums = torch.zeros(len(values), 16).index_add_(1, ring.flatten(), power.flatten(1))
    counts = torch.zeros(16).index_add_(0, ring.flatten(), torch.ones(side * side))
    return (sums / counts).clamp_min(1e-12).log()


def distance(found: Tensor, wanted: Tensor) -> float:
    """Between the means of a statistic, in deviations of the wanted one, root mean squared."""
    spread = wanted.std(0).clamp_min(1e-3)
    return float(((found.mean(0) - wanted.mean(0)) / spread).square().mean().sqrt())
