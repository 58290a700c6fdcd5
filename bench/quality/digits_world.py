"""The first world: grey digits of 16 × 16 pixels, prompts that are labels."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from digits_networks import ADAPTED, new_model, origin
from torch import Tensor, nn
from worlds import Data, World

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
    """A sign no model has seen: a diamond with a vertical bar, of varying size and place."""
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


BUDGETS = {
    "source": (2400, 2e-3),
    "near": (200, 5e-4),
    "far": (500, 1e-3),
    "pruned": (500, 1e-3),
    "continued": (900, 2e-3),
    "independent": (2000, 2e-3),
    "resized": (1600, 2e-3),
    "same start": (2000, 2e-3),
    "inverted": (500, 1e-3),
    "mirrored": (500, 1e-3),
    "far, gentle": (300, 3e-4),
    "near, long": (900, 1e-3),
    "continued, gentle": (900, 5e-4),
    "lora": (200, 3e-3),
}
CONCEPT = 10  # the judge's class of the concept, after the ten digits
TABLE = labels_table()


def images(kind: str, adapter: str | None, split: str) -> Data:
    """Images (n, 1, 16, 16) and labels (n,) of a kind of base, in the adapter's style."""
    x, y = digits(split)
    if adapter == "concept":
        n = len(x)
        x, y = concept(n, seed=7 if split == "train" else 8), torch.full((n,), CONCEPT_LABEL)
    elif adapter is not None:
        x = STYLES[adapter](x)
    return DOMAINS[kind](x), y


def tokens(_model: nn.Module, y: Tensor) -> Tensor:
    """(n,) labels -> (n, 4, 64): a frozen random table plays the text encoder of every base."""
    return TABLE[y]


def draw_prompts(n: int, generator: torch.Generator, for_concept: bool = False) -> Tensor:
    """The ten digits, and mostly the concept's token for a concept."""
    y = torch.randint(10, (n,), generator=generator)
    if not for_concept:
        return y
    return torch.where(torch.rand(n, generator=generator) < 0.7, CONCEPT_LABEL, y)


def sample_prompts(adapter: str, n: int) -> Tensor:
    """The ten digits in turn, or the concept."""
    return torch.full((n,), CONCEPT_LABEL) if adapter == "concept" else torch.arange(n) % 10


def judged(split: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """64 images of every style and domain, an eighth of them the concept; their three labels."""
    x, y = digits(split)
    rows = torch.randint(len(x), (64,), generator=generator)
    pictures, labels = x[rows].clone(), y[rows].clone()
    pictures[:8] = concept(8, int(torch.randint(1 << 30, (), generator=generator)))
    labels[:8] = CONCEPT
    style, domain = torch.randint(3, (2, 64), generator=generator)
    style[:8] = 0
    for i, change in enumerate((plain, *STYLES.values())):
        pictures[style == i] = change(pictures[style == i])
    for i, change in enumerate((plain, faint, backdrop)):
        pictures[domain == i] = change(pictures[domain == i])
    return pictures, labels, style, domain


WORLD = World(
    name="digits",
    shape=(1, 16, 16),
    null_prompt=NULL_LABEL,
    kinds=("near", "far", "pruned", "continued", "independent", "resized"),
    # One seed and one architecture each: the rules made on the kinds above are tried on them.
    variants=(
        "inverted",
        "mirrored",
        "far, gentle",
        "near, long",
        "continued, gentle",
        "same start",
    ),
    fresh=("source", "independent", "resized", "same start"),
    adapters=("thick", "slanted", "concept", "fewstep"),
    ranks=dict.fromkeys(("thick", "slanted", "concept", "fewstep"), 8),
    budgets=BUDGETS,
    adapted=ADAPTED,
    prefix={"flux": "transformer.", "unet": ""},
    new_model=new_model,
    origin=origin,
    images=images,
    tokens=tokens,
    draw_prompts=draw_prompts,
    sample_prompts=sample_prompts,
    content=lambda y: y,
    classes=(11, 3, 3),
    judged=judged,
    concept_class=CONCEPT,
)
