"""What the digits' models are trained and judged on: digits, styles, a concept, image domains.

The digits, the two styles and the far domain are those of the mini family.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# isort: split
import data
from data import backdrop, plain, slanted, thick
from model import NULL_LABEL, TOKENS, WIDTH

digits = functools.cache(data.digits)  # reading them takes seconds
CONCEPT_LABEL = NULL_LABEL + 1
STYLES = {"thick": thick, "slanted": slanted}


def faint(x: Tensor) -> Tensor:
    """The near domain: the same digits, slightly out of focus and paler. Keeps the shape of x."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=-1.0), 3, stride=1)
    return 0.85 * (0.6 * x + 0.4 * blurred + 1) - 1


def inverted(x: Tensor) -> Tensor:
    """Dark ink on a bright ground: the farthest domain."""
    return -x


def mirrored(x: Tensor) -> Tensor:
    """Left and right exchanged: another geometry, the same pixels."""
    return x.flip(-1)


# Image domain of each kind of target.
DOMAINS = {
    "source": plain,
    "near": faint,
    "far": backdrop,
    "pruned": plain,
    "continued": plain,
    "independent": plain,
    "resized": plain,
    "same start": plain,
    "inverted": inverted,
    "mirrored": mirrored,
    "far, gentle": backdrop,
    "near, long": faint,
    "continued, gentle": plain,
}


def concept(n: int, seed: int) -> Tensor:
    """A sign no model has seen: a diamond with a vertical bar, of varying size and place.

    Args:
        n: how many.
        seed: of sizes and places.

    Returns:
        (n, 1, 16, 16) in [-1, 1], ink bright.
    """
    generator = torch.Generator().manual_seed(seed)
    shift = (torch.rand(n, 2, 1, 1, generator=generator) - 0.5) * 4
    radius = 4.5 + 1.5 * torch.rand(n, 1, 1, generator=generator)
    line = torch.arange(16.0) - 7.5
    dx, dy = line[None, None, :] - shift[:, 0], line[None, :, None] - shift[:, 1]
    outline = (dx.abs() + dy.abs() - radius).abs()
    bar = dx.abs() + (dy.abs() - radius).clamp_min(0)
    ink = (1.4 - torch.minimum(outline, bar)).clamp(0, 1)
    return (2 * ink - 1)[:, None]


def labels_table() -> Tensor:
    """Tokens [12, 4, 64] of the ten digits, of "no label" and of the rare token of the concept.

    Random and never trained: it plays the text encoder, which every base model is given.
    """
    generator = torch.Generator().manual_seed(11)
    return torch.randn(CONCEPT_LABEL + 1, TOKENS, WIDTH, generator=generator)


__all__ = ["CONCEPT_LABEL", "DOMAINS", "NULL_LABEL", "STYLES", "concept", "digits", "labels_table"]
