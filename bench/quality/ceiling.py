"""What no rule without data can beat: the source's updates with strengths fitted to the target.

A factor on every module's update is trained on the target's own images, which a transfer never
sees. A rule that only weakens or strengthens modules can at best choose these factors.
"""

from __future__ import annotations

import copy

import torch
from contenders import Updates
from flow import fit
from lessons import Lesson
from torch import Tensor, nn
from worlds import backbone

STEPS, RATE = 60, 5e-2


class Strengthened(nn.Module):
    """A linear layer with an update at a strength that can be trained."""

    def __init__(self, layer: nn.Module, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.layer, self.up, self.down = layer, up, down
        self.strength = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        return self.layer(x) + self.strength * (x @ self.down.mT @ self.up.mT)


def fit_strengths(target: nn.Module, updates: Updates, lesson: Lesson) -> Updates:
    """The updates, each at the strength that minimises the adapter's training loss on the target.

    Args:
        target: the base; left as it is.
        updates: {module: update} to scale.
        lesson: what the adapter is about there.
    """
    model = copy.deepcopy(target).requires_grad_(False)
    inner = backbone(model)
    layers = {}
    for name, update in updates.items():
        parent, _, child = name.rpartition(".")
        layer = Strengthened(inner.get_submodule(name), update.up, update.down)
        inner.get_submodule(parent).register_module(child, layer)
        layers[name] = layer
    strengths = [layer.strength for layer in layers.values()]
    fit(strengths, lesson.loss(model), STEPS, RATE, seed=6000)
    return {
        name: type(update)(update.up * layers[name].strength.item(), update.down)
        for name, update in updates.items()
    }
