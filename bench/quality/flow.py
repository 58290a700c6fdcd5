"""Rectified flow for every world: noising, sampling, and the mini family's training loop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "examples/mini_family"))

# isort: split
from model import noised, predict
from train import BATCH, fit

if TYPE_CHECKING:
    from worlds import World

SAMPLER_STEPS, FEW_STEPS = 25, 4


def guided_velocity(
    model: nn.Module, x: Tensor, t: Tensor, tokens: Tensor, null: Tensor, guidance: float
) -> Tensor:
    """The velocity with classifier-free guidance: v_null + guidance (v - v_null)."""
    both = predict(model, torch.cat([x, x]), torch.cat([t, t]), torch.cat([tokens, null]))
    wanted, free = both.chunk(2)
    return free + guidance * (wanted - free)


@torch.no_grad()
def sample(
    model: nn.Module,
    tokens: Tensor,
    null: Tensor,
    shape: tuple[int, ...],
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Euler steps from noise (t = 1) to images (n, *shape) in [-1, 1] (t = 0)."""
    n = len(tokens)
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    for i in range(steps):
        t = torch.full((n,), 1 - i / steps)
        x = x - guided_velocity(model, x, t, tokens, null, guidance) / steps
    return x.clamp(-1, 1)


class Sampler:
    """Euler steps with guidance, the times of every image shifted within their step.

    A few-step adapter runs as its user would run it: few steps and no guidance.
    """

    def __init__(
        self,
        world: World,
        model: nn.Module,
        adapter: str,
        images: int,
        steps: int = SAMPLER_STEPS,
        few: bool = False,
        guidance: float | None = None,
    ) -> None:
        """The model to run, images and steps of a run, and whether few steps are enough."""
        self.world, self.model, self.adapter, self.images = world, model, adapter, images
        self.steps, self.few = FEW_STEPS if few else steps, few
        self.guidance = world.guidance if guidance is None else guidance

    @torch.no_grad()
    def __call__(self, seed: int) -> None:
        """One run from noise."""
        n = 2 * self.images if self.few else self.images
        generator = torch.Generator().manual_seed(seed)
        y = self.world.draw_prompts(n, generator, self.adapter == "concept")
        x = torch.randn(n, *self.world.shape, generator=generator)
        tokens = self.world.tokens(self.model, y)
        null = self.world.tokens(self.model, self.world.null_like(y))
        times = torch.linspace(1, 0, self.steps + 1).repeat(n, 1)
        times[:, 1:-1] += (torch.rand(n, 1, generator=generator) - 0.5) / self.steps
        for i in range(self.steps):
            t, after = times[:, i], times[:, i + 1]
            if self.few or self.guidance == 1:
                v = predict(self.model, x, t, tokens)
            else:
                v = guided_velocity(self.model, x, t, tokens, null, self.guidance)
            x = x + (after - t)[:, None, None, None] * v


__all__ = ["BATCH", "Sampler", "fit", "guided_velocity", "noised", "predict", "sample"]
