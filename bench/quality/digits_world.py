"""The first world: grey digits of 16 × 16 pixels, prompts that are labels."""

from __future__ import annotations

import torch
from digits_images import (
    CONCEPT_LABEL,
    DOMAINS,
    NULL_LABEL,
    STYLES,
    backdrop,
    concept,
    digits,
    faint,
    labels_table,
    plain,
)
from digits_networks import ADAPTED, DROPPED, new_model, origin
from torch import Tensor, nn
from worlds import Data, World

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
    dropped={("pruned", arch): blocks for arch, blocks in DROPPED.items()},
    images=images,
    tokens=tokens,
    draw_prompts=draw_prompts,
    sample_prompts=sample_prompts,
    content=lambda y: y,
    classes=(11, 3, 3),
    judged=judged,
    concept_class=CONCEPT,
)
