"""The second world: coloured icons of 24 × 24 pixels, prompts of four words.

The icons are those of six sets that draw the same things in their own styles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from digits_networks import ADAPTED
from icons.catalogue import CONCEPT
from icons.drawing import (
    MERGED,
    SIZE,
    STYLES,
    faint,
    flatten,
    merge_looks,
    pictures,
    plain,
    sketched,
    striped,
)
from icons.networks import Painter, is_new, is_silent, origin
from icons.words import NULL_PROMPT, WHAT, prompt_number, prompt_parts
from icons.words import draw_prompts as draw_words
from torch import Tensor, nn
from worlds import Data, World

MERGES = {
    f"merged {n}": (tuple(MERGED)[:n], weight) for n, weight in ((1, 1.0), (3, 0.7), (10, 0.3))
}
BLENDS = {"blended": {"near": 0.6, "continued": 0.4}}
LOOKS = {
    "near": faint,
    "far": sketched,
    "far ground": striped,
    "blended": merge_looks({"near": faint}, 0.6),
    **{
        kind: merge_looks({name: MERGED[name] for name in names}, weight)
        for kind, (names, weight) in MERGES.items()
    },
}
LOOKS |= {"far, long": sketched, "sibling": LOOKS["far ground"]}
KINDS = (
    "pruned",
    "far",
    "merged 1",
    "few-step",
    "near",
    "far ground",
    "continued",
    "sibling",
    "deepened",
    "blended",
    "independent",
    "continued, long",
    "far, long",
    "guided",
    "merged 10",
    "renumbered",
    "merged 3",
    "resized",
)
BUDGETS = {
    "source": (6000, 2e-3),
    "near": (200, 5e-4),
    "far": (500, 1e-3),
    "far ground": (500, 1e-3),
    "far, long": (1500, 1e-3),
    "pruned": (500, 1e-3),
    "renumbered": (500, 1e-3),
    "deepened": (400, 1e-3),
    "continued": (600, 1e-3),
    "continued, long": (1500, 1e-3),
    "independent": (2500, 2e-3),
    "resized": (2500, 2e-3),
    "same start": (2500, 2e-3),
    "few-step": (500, 1e-3),
    "guided": (300, 1e-3),
    "lora": (150, 3e-3),
}
RANKS = {"neon": 16, "duotone": 4, "concept": 16, "fewstep": 64}
RANKS |= dict(zip(MERGED, (4, 8, 16, 32, 64) * 2, strict=True))
Draw = Callable[[str, bool], Data]
"""(split, whether of the concept) -> layers and prompts."""


def images(kind: str, adapter: str | None, split: str, draw: Draw = pictures) -> Data:
    """Images (n, 3, size, size) and prompts (n,) of a kind of base, in the adapter's style."""
    layers, y = draw(split, adapter == "concept")
    style = plain if adapter in (None, "concept") else (STYLES | MERGED)[adapter]
    return flatten(LOOKS.get(kind, plain)(style(layers))), y


def tokens(model: nn.Module, y: Tensor) -> Tensor:
    """(n,) prompts -> (n, 4, 64), by the model's text encoder."""
    return model.encode(y)


def draw_prompts(n: int, generator: torch.Generator, for_concept: bool = False) -> Tensor:
    """Everything that there are pictures of, and mostly the concept for a concept."""
    y = draw_words(n, generator)
    if not for_concept:
        return y
    concepts = draw_words(n, generator, concept=True)
    return torch.where(torch.rand(n, generator=generator) < 0.7, concepts, y)


def sample_prompts(adapter: str, n: int) -> Tensor:
    """Every word in turn, or the concept; the other words of each prompt are drawn."""
    generator = torch.Generator().manual_seed(21)
    y = draw_words(n, generator, concept=adapter == "concept")
    if adapter == "concept":
        return y
    _, *others = prompt_parts(y)
    return prompt_number(torch.arange(n) % (len(WHAT) - 1), *others)


def content(y: Tensor) -> Tensor:
    """(n,) prompts -> the words for what is drawn."""
    return prompt_parts(y)[0]


def judged(split: str, generator: torch.Generator, draw: Draw = pictures) -> tuple[Tensor, ...]:
    """64 images of every style and look, an eighth of them the concept; their three labels."""
    layers, y = (part.clone() for part in _judged_rows(split, generator, draw))
    styles, looks = (plain, *STYLES.values()), (plain, faint, sketched, striped)
    style = torch.randint(len(styles), (64,), generator=generator)
    look = torch.randint(len(looks), (64,), generator=generator)
    for i, change in enumerate(styles):
        layers[style == i] = change(layers[style == i])
    for i, change in enumerate(looks):
        layers[look == i] = change(layers[look == i])
    return flatten(layers), content(y), style, look


def _judged_rows(split: str, generator: torch.Generator, draw: Draw) -> tuple[Tensor, Tensor]:
    """Layers and prompts of 56 pictures and 8 of the concept."""
    parts = []
    for n, concept in ((8, True), (56, False)):
        layers, y = draw(split, concept)
        rows = torch.randint(len(y), (n,), generator=generator)
        parts.append((layers[rows], y[rows]))
    layers, prompts = zip(*parts, strict=True)
    return torch.cat(layers), torch.cat(prompts)


WORLD = World(
    name="icons",
    shape=(3, SIZE, SIZE),
    null_prompt=NULL_PROMPT,
    kinds=KINDS,
    variants=("same start",),
    variants_seed=1,
    fresh=("source", "independent", "resized", "same start"),
    adapters=("neon", "duotone", "concept", "fewstep"),
    ranks=RANKS,
    budgets=BUDGETS,
    adapted=ADAPTED,
    prefix={"flux": "backbone.", "unet": "backbone."},
    new_model=Painter,
    origin=origin,
    images=images,
    tokens=tokens,
    draw_prompts=draw_prompts,
    sample_prompts=sample_prompts,
    content=content,
    classes=(len(WHAT), 3, 4),
    judged=judged,
    concept_class=WHAT.index(CONCEPT),
    judge_steps=1500,
    is_new=is_new,
    is_silent=is_silent,
    pairs_of={"sibling": ("continued", "far ground")},
    merged=MERGES,
    blended=BLENDS,
    imitating=("pruned", "renumbered"),
    distilled={"few-step": "lines", "guided": "guided"},
    teaches_words="flux",
    pairs=512,
    student_pairs=1024,
    teacher_steps=10,
    judged_rows=160,
    once=("renumbered", "merged 3", "resized"),
    sampled_seeds=(1,),
)
