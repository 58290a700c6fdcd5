"""Scores from samples: features of a small classifier, style distance, concept, diversity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from worlds import World


class Judge(nn.Module):
    """Tells what is drawn, in which style and in front of what; its features measure style."""

    def __init__(self, world: World) -> None:
        super().__init__()
        channels, height, width = world.shape
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * (height // 4) * (width // 4), 64),
            nn.ReLU(),
        )
        self.content, self.style, self.domain = (nn.Linear(64, n) for n in world.classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images -> features (n, 64) and logits (n, classes) of the three questions."""
        features = self.trunk(x)
        return features, self.content(features), self.style(features), self.domain(features)


def batch(world: World, split: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """64 slightly noisy images of every style and look, and their three labels."""
    images, *labels = world.judged(split, generator)
    noise = 0.1 * torch.rand(64, 1, 1, 1, generator=generator)
    noise = noise * torch.randn(images.shape, generator=generator)
    return images + noise, *labels


def train_judge(world: World) -> Judge:
    """Some minutes on one core."""
    torch.manual_seed(6)
    judge, generator = Judge(world), torch.Generator().manual_seed(6)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.01)
    for _ in range(world.judge_steps):
        images, *labels = batch(world, "train", generator)
        logits = judge(images)[1:]
        loss = sum(F.cross_entropy(z, label) for z, label in zip(logits, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval().requires_grad_(False)


def hits(logits: Tensor, wanted: Tensor) -> float:
    """The share of rows whose largest logit is the wanted class."""
    return float((logits.argmax(1) == wanted).float().mean())


def mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features (n, d) and (m, d).

    Gaussian kernel; its width is the median distance within y, the reference.
    """
    width = torch.pdist(y).median()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-(torch.cdist(a, b) / width).square() / 2).exp()

    def within(a: Tensor) -> Tensor:
        n = len(a)
        return (kernel(a, a).sum() - n) / (n * (n - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())
