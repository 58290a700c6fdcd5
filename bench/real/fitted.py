"""Fits a terrain LoRA to the two running models: ``python bench/real/fitted.py DATA LORA -o FILE``.

Without -o it is measured what a copy reaches.

No heightfield is read. Both models draw their own terrain in one step from noise, as the package
does, and are asked about it under fresh noise of the study's σ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).parents[1] / "quality"))

# isort: split
from adamw import fit_by_adamw
from loras import read_lora, save_updates
from network import SIDE, SIGMA_MAX, Network, load_network
from safetensors.torch import load_file
from torch import Tensor
from world import SIGMAS

from prolora import LowRank
from prolora import fitting as probe
from prolora.fitting.gate import COPY
from prolora.fitting.solver import joint

AT_ONCE, ASKED = 4, 3
"""Terrains of a call, and times that each is asked about under new noise."""
SETTINGS = probe.FitSettings(images=16, fit_steps=12, probes=192, held_out=48, batch=16)
"""An eighth of the default's samples, as each takes a quarter of a second of one core."""


def fit_lora(
    source: Network, target: Network, lora: Mapping[str, LowRank], force: bool = False
) -> probe.ProbeTransfer:
    """The LoRA of the target that changes it as the given one changes the source."""
    samplers = probe.Samplers(*(Sampler(model) for model in (source, target)))
    settings = replace(SETTINGS, force=force)
    return probe.fit_to_models(source, target, lora, samplers, settings)


class Sampler:
    """Draws terrain of random difficulties, and asks about it under noise."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def __call__(self, seed: int) -> Iterator[None]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(SETTINGS.images // AT_ONCE):
            self._ask(generator)
            yield

    def _ask(self, generator: torch.Generator) -> None:
        difficulty = torch.rand(AT_ONCE, generator=generator)
        terrain = torch.zeros(AT_ONCE, 1, SIDE, SIDE)
        for sigma in (torch.full((AT_ONCE,), SIGMA_MAX), *draw_sigmas(generator)):
            noise = torch.randn(terrain.shape, generator=generator)
            answer = self.network(terrain + sigma[:, None, None, None] * noise, sigma, difficulty)
            if not terrain.any():
                terrain = answer.clamp(-1, 1)


def draw_sigmas(generator: torch.Generator) -> Iterator[Tensor]:
    low, high = map(math.log, SIGMAS)
    for _ in range(ASKED):
        yield torch.exp(low + (high - low) * torch.rand(AT_ONCE, generator=generator))


@contextlib.contextmanager
def adamw_in_place() -> Iterator[None]:
    """AdamW on the factors in place of the steps of a fit: the same probes, as many predictions."""
    with mock.patch.object(joint, "fit_in_factors", fit_by_adamw):
        yield


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
    lora = read_lora(load_file(given.lora))
    moved = fit_lora(source, target, lora)
    gate = moved.report.gate
    if gate is not None and gate.decision == COPY:
        save_updates(given.out, lora)  # as good, says the gate
    else:
        moved.save(given.out)
    print("\n".join(moved.report.sentences()))
    print(json.dumps(moved.report.seconds))


if __name__ == "__main__":
    main()
