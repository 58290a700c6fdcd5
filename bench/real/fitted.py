"""Fits a terrain LoRA to the two running models: ``python bench/real/fitted.py DATA LORA -o FILE``.

No heightfield is read. Both models draw their own terrain in one step from noise, as the package
does, and are asked about it under fresh noise of the study's σ.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "quality"))

# isort: split
from contenders import scale_updates
from models import load_lora, save_lora
from network import SIDE, SIGMA_MAX, Network, load_network
from torch import Tensor
from world import SIGMAS
from world_side import choose_written

from prolora import LowRank
from prolora import fitting as probe
from prolora.fitting.pipelines.schedules import NoiseSchedule

ASKED = 12
"""Levels of noise that a terrain is asked about."""
SETTINGS = probe.FitSettings(images=16, fit_steps=12, probes=192, held_out=48, batch=16)
"""An eighth of the default's samples, as each takes a quarter of a second of one core."""


def fit_lora(
    source: Network, target: Network, lora: Mapping[str, LowRank], force: bool = False
) -> probe.Fitted:
    """The LoRA of the target that changes it as the given one changes the source."""
    asking = probe.Asking(TerrainSide(source), TerrainSide(target), lora)
    return probe.fit_sides(asking, replace(SETTINGS, force=force))


class Sigmas(NoiseSchedule):
    """Terrain + σ·noise, of which the terrain is predicted; times are σ."""

    def scales(self, level: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(level), level / (1 - level)

    def time_at(self, level: Tensor) -> Tensor:
        return level / (1 - level)

    @property
    def levels(self) -> tuple[float, float]:
        low, high = (sigma / (1 + sigma) for sigma in SIGMAS)
        return low, high


class TerrainSide(probe.FitSide):
    """Draws terrain of random difficulties in one step."""

    schedule = Sigmas("sample", None)
    prompts, at_once = 64, 4

    def __init__(self, network: Network) -> None:
        self.name, self.denoiser = "terrain", network
        self.difficulties = torch.rand(64, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def sample(self, number: int, prompt: int) -> probe.Image:
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(1, 1, SIDE, SIDE, generator=generator)
        sigma = torch.tensor([SIGMA_MAX])
        terrain = self.denoiser(sigma * noise, sigma, self.difficulties[[prompt]]).clamp(-1, 1)
        sigmas = torch.logspace(*(math.log10(x) for x in reversed(SIGMAS)), ASKED).double()
        return probe.Image(terrain, noise, sigmas / (1 + sigmas))

    def build_call(
        self, state: Tensor, level: Tensor, prompts: Sequence[int], adapted: bool = False
    ) -> probe.Call:
        asked = self.difficulties[[max(i, 0) for i in prompts]]
        return probe.Call((state, self.schedule.time_at(level).float(), asked), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="what fetch.py made")
    parser.add_argument("lora", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--source", default="0.4.1")
    parser.add_argument("--target", default="0.4.2")
    given = parser.parse_args()
    torch.set_num_threads(1)
    source, target = (
        load_network(given.data / f"{one}.onnx") for one in (given.source, given.target)
    )
    lora = load_lora(given.lora)
    moved = fit_lora(source, target, lora)
    save_lora(scale_updates(*choose_written(moved, lora)), given.out)
    print("\n".join(moved.report.sentences()))
    print(json.dumps(moved.report.seconds))


if __name__ == "__main__":
    main()
