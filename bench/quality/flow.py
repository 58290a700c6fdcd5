"""Rectified flow for every world: noising, sampling, and the mini family's training loop."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "examples/mini_family"))

# isort: split
from model import noised, predict
from train import BATCH, fit

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


__all__ = [
    "BATCH",
    "fit",
    "guided_velocity",
    "noised",
    "predict",
    "sample",
]
