"""A model of a world as a fit sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from contenders import Updates
from torch import Tensor, nn
from worlds import World

from prolora import LowRank
from prolora import fitting as probe
from prolora.fitting.gate import COPY
from prolora.fitting.pipelines.schedules import NoiseSchedule, Times


class WorldSide(probe.FitSide):
    """A model of a world, sampled by Euler steps with guidance."""

    schedule = NoiseSchedule("flow", None, times=Times(1.0, 0.0))
    prompts = 64

    def __init__(self, world: World, model: nn.Module, adapter: str, steps: int) -> None:
        self.world, self.denoiser, self.steps = world, model, steps
        self.name = type(model).__name__
        generator = torch.Generator().manual_seed(0)
        self.asked = world.draw_prompts(self.prompts, generator, adapter == "concept")

    @torch.no_grad()
    def sample(self, number: int, prompt: int) -> probe.Image:
        noise = torch.randn(1, *self.world.shape, generator=torch.Generator().manual_seed(number))
        x, levels = noise, 1 - torch.arange(self.steps).double() / self.steps
        for level in levels:
            free, wanted = (self.predict(x, level[None], [one]) for one in (-1, prompt))
            x = x - (free + self.world.guidance * (wanted - free)) / self.steps
        return probe.Image(x, noise, levels)

    def build_call(
        self, state: Tensor, level: Tensor, prompts: Sequence[int], adapted: bool = False
    ) -> probe.Call:
        y = torch.stack([self.asked[i] for i in prompts])
        free = torch.tensor([i == probe.NO_PROMPT for i in prompts])
        y = torch.where(free.reshape(-1, *[1] * (y.dim() - 1)), self.world.null_like(y), y)
        tokens = self.world.tokens(self.denoiser, y)
        return probe.Call((state, 1000 * level.float(), tokens), {"return_dict": False})


def fit_lora(
    world: World,
    models: tuple[nn.Module, nn.Module],
    updates: Mapping[str, LowRank],
    adapter: str,
    settings: probe.FitSettings,
) -> probe.Fitted:
    """Fits updates of the first transformer's modules, named as in diffusers, to the second."""
    prefix = world.prefix["flux"]
    named = {f"{prefix}{name}": update for name, update in updates.items()}
    sides = (WorldSide(world, model, adapter, settings.steps) for model in models)
    asking = probe.Asking(*sides, named, look=settings.look_of_source)
    fitted = probe.fit_sides(asking, settings)
    own = {name.removeprefix(prefix): update for name, update in fitted.updates.items()}
    return replace(fitted, updates=own)


def choose_written(fitted: probe.Fitted, lora: Updates) -> tuple[Updates, float]:
    """What a fit writes, at strength 1, and its strength; the copy where the gate says so."""
    gate = fitted.report.gate
    if gate.decision == COPY:
        return lora, gate.copy_strength
    return fitted.updates, gate.strength
