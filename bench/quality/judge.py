"""Scores from samples: features of a small classifier, style distance, concept, diversity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from images import CONCEPT_LABEL, concept, digits, faint
from torch import Tensor, nn

# isort: split
from data import backdrop, plain, slanted, thick

STYLES, DOMAINS = (plain, thick, slanted), (plain, faint, backdrop)
CONCEPT = 10  # class of the concept, after the ten digits
STEPS = 900


class Judge(nn.Module):
    """Tells what is drawn, in which style and in front of what; its features measure style."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * 16, 64),
            nn.ReLU(),
        )
        self.content, self.style, self.domain = (nn.Linear(64, n) for n in (11, 3, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (n, 1, 16, 16) -> features (n, 64) and logits (n, 11), (n, 3), (n, 3)."""
        features = self.trunk(x)
        return features, self.content(features), self.style(features), self.domain(features)


def batch(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """64 images of every style and domain, an eighth of them the concept; their three labels."""
    rows = torch.randint(len(x), (64,), generator=generator)
    images, labels = x[rows].clone(), y[rows].clone()
    images[:8] = concept(8, int(torch.randint(1 << 30, (), generator=generator)))
    labels[:8] = CONCEPT
    style, domain = torch.randint(3, (2, 64), generator=generator)
    style[:8] = 0
    for i in range(3):
        images[style == i] = STYLES[i](images[style == i])
    for i in range(3):
        images[domain == i] = DOMAINS[i](images[domain == i])
    noise = 0.1 * torch.rand(64, 1, 1, 1, generator=generator)
    noise = noise * torch.randn(images.shape, generator=generator)
    return images + noise, labels, style, domain


def train_judge() -> Judge:
    """A minute on one core."""
    torch.manual_seed(6)
    judge, generator = Judge(), torch.Generator().manual_seed(6)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.01)
    x, y = digits("train")
    for _ in range(STEPS):
        images, *labels = batch(x, y, generator)
        logits = judge(images)[1:]
        loss = sum(F.cross_entropy(z, label) for z, label in zip(logits, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval().requires_grad_(False)


def accuracy(judge: Judge) -> list[float]:
    """Shares of held-out images whose content, style and domain are recognised correctly."""
    x, y = digits("held_out")
    generator = torch.Generator().manual_seed(9)
    hits = torch.zeros(3)
    for _ in range(20):
        images, *labels = batch(x, y, generator)
        logits = judge(images)[1:]
        hits += torch.tensor(
            [(z.argmax(1) == t).float().mean() for z, t in zip(logits, labels, strict=True)]
        )
    return [round(v, 3) for v in (hits / 20).tolist()]


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


def diversity(features: Tensor, labels: Tensor) -> float:
    """Mean distance between features of images with the same label."""
    return float(
        torch.stack([torch.pdist(features[labels == c]).mean() for c in labels.unique()]).mean()
    )


__all__ = ["CONCEPT", "CONCEPT_LABEL", "Judge", "accuracy", "diversity", "mmd", "train_judge"]
