"""What a judge sees in the shipped models' samples: ``python bench/quality/seen.py --work DIR``.

Writes the table of examples/icon_family/README.md and, with `--prompts`, the demo's prompts: those
that the source and the model trained apart draw best. The judge learns real pictures, no samples;
it is made in DIR if it is missing.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from icons import shipped
from icons.drawing import flatten
from icons.words import (
    GROUND,
    PROMPTS,
    STYLE,
    VOCABULARY,
    WHAT,
    prompt_number,
    prompt_parts,
    word_ids,
)
from judge import Judge, hits
from results import fill_page, format_table
from scoring import apply_updates
from shipped_world import WORLD, draw
from torch import Tensor
from yards import open_judge

from prolora.cli.demo import FEW_STEPS, STEPS

FAMILY = Path(__file__).parents[2] / "examples/icon_family"
GUIDANCE, SAMPLES, NOISES = 3.0, 320, 4
COUNT = 24
"""Prompts of a file."""
COLOURED = len(STYLE) - 1
MEMBERS = ("source", "apart", "pruned", "far", "few-step")
LORAS = ("neon", "duotone", "concept")


def sample(kind: str, lora: str, y: Tensor) -> Tensor:
    """Images of a member with a LoRA of that name or "", as the demo draws them."""
    model = shipped.load_model(kind)
    steps, guidance = (FEW_STEPS[kind], 1.0) if kind in FEW_STEPS else (STEPS, GUIDANCE)
    with apply_updates(model, shipped.load_lora(lora) if lora else {}):
        parts = [WORLD.sample(model, one, steps, guidance, i) for i, one in enumerate(y.split(64))]
    return torch.cat(parts)


def list_candidates(concept: bool) -> Tensor:
    """Prompts of coloured icons: every thing and set on two grounds, or the concept on all."""
    things = [len(WHAT) - 1] if concept else range(len(WHAT) - 1)
    rows = []
    for what, style in itertools.product(things, range(COLOURED)):
        grounds = range(len(GROUND)) if concept else ((3 * what + style + k) % 8 for k in (0, 5))
        rows += [(what, style, 0, ground) for ground in grounds]
    return prompt_number(*torch.tensor(rows).unbind(1))


def choose_prompts(judge: Judge, sides: tuple[tuple[str, str], ...], concept: bool) -> Tensor:
    """The prompts that the sides draw best by the judge's log-probability; each thing first."""
    y = list_candidates(concept)
    score = torch.zeros(len(y))
    for kind, lora in sides:
        logits = judge(sample(kind, lora, y.repeat(NOISES)))[1].log_softmax(1)
        asked = WORLD.content(y).repeat(NOISES)
        score += logits[torch.arange(len(asked)), asked].reshape(NOISES, -1).mean(0)
    best: dict[int, int] = {}
    order = y[score.argsort(descending=True)]
    for number, thing in zip(order.tolist(), WORLD.content(order).tolist(), strict=True):
        best.setdefault(thing, number)
    first = list(best.values())
    others = [number for number in order.tolist() if number not in first]
    return torch.tensor([*first, *others][:COUNT])


def write_prompts(y: Tensor, path: Path) -> None:
    """A line a prompt."""
    lines = (" ".join(VOCABULARY[word] for word in row) for row in word_ids(y).tolist())
    path.write_text("\n".join(lines) + "\n", "utf-8")


def read_prompts(path: Path) -> Tensor:
    """The prompts of a file."""
    numbers = {tuple(row): y for y, row in enumerate(word_ids(torch.arange(PROMPTS)).tolist())}
    lines = path.read_text("utf-8").splitlines()
    return torch.tensor([numbers[tuple(map(VOCABULARY.index, line.split()))] for line in lines])


def list_rows() -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name of a row, its images and their prompts."""
    layers, y = draw("fresh", False)
    yield "real pictures of the icons", flatten(layers), y
    for kind, lora in (*((kind, "") for kind in MEMBERS), *(("source", lora) for lora in LORAS)):
        y = WORLD.sample_prompts(lora, SAMPLES)
        yield f"{kind} + {lora}" if lora else kind, sample(kind, lora, y), y
    y = read_prompts(FAMILY / "weights/prompts.txt").repeat(NOISES)
    for kind in ("source", "apart"):
        yield f"{kind}, the demo's prompts", sample(kind, "", y), y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="of the judge")
    parser.add_argument("--prompts", action="store_true", help="choose the demo's prompts anew")
    given = parser.parse_args()
    torch.set_num_threads(1)
    judge = open_judge("shipped", given.work)
    if given.prompts:
        sides = ("source", ""), ("apart", "")
        write_prompts(choose_prompts(judge, sides, False), FAMILY / "weights/prompts.txt")
        sides = (("source", "concept"),)
        write_prompts(choose_prompts(judge, sides, True), FAMILY / "weights/butterflies.txt")
    lines = []
    for name, images, y in list_rows():
        content, dark = judge(images)[1], prompt_parts(y)[1] == COLOURED
        parts = (torch.ones_like(dark), ~dark, dark)
        shares = [hits(content[rows], WORLD.content(y)[rows]) for rows in parts if rows.any()]
        lines.append([name, *(f"{share:.2f}" for share in shares), *["–"] * (3 - len(shares))])
        print(*lines[-1], flush=True)
    page = FAMILY / "README.md"
    table = format_table(["", "all", "coloured sets", "silhouettes"], lines)
    page.write_text(fill_page(page.read_text("utf-8"), {"seen": table}), "utf-8")


if __name__ == "__main__":
    main()
