"""A short training on a few pictures: ``python bench/quality/pictures.py --work DIR --out FILE``.

Pictures of a LoRA's idea in the target's look are at hand. AdamW goes on from the copy at START
(with --kind apart from the fit), or from nothing, for at most STEPS steps, with samples of the
target itself in every batch. A quarter of the pictures is held out, and its loss chooses the step.
A share is what is recovered of the held-out loss between no LoRA and one trained on all pictures of
the world; with --samples a classifier says how many samples show what was asked for, and the style.
Rows that FILE has are not made again. The icons are the shipped ones; the digits' models are
trained in DIR first.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import STRENGTHS, Updates, scale_updates
from lessons import Images
from models import load_lora, save_lora
from results import RowsFile
from scoring import SAMPLE_STEPS, held_out_loss
from training import insert_lora, read_factors
from worlds import Data, World
from yards import NAMES, Yard, choose_world, list_adapters, open_yard

FAR, APART = "far", "apart"
START, STEPS, RATE, EVERY = 0.6, 120, 2e-3, 10
KEPT = 96
SHOWN = 144
"""Rows of the held-out loss: each held-out picture at several levels of noise."""


def choose_pictures(yard: Yard, count: int, seed: int) -> tuple[Data, Data]:
    """Pictures to learn from, and the held-out quarter at several levels of noise."""
    x, y = yard.world.images(yard.kind, yard.adapter, "train")
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(9000 + seed))[:count]
    unseen, seen = rows[: count // 4], rows[count // 4 :]
    unseen = unseen.repeat(SHOWN // len(unseen))
    return (x[seen], y[seen]), (x[unseen], y[unseen])


@functools.lru_cache(maxsize=2)
def sample_target(yard: Yard, seed: int) -> Data:
    """What the target draws without a LoRA."""
    y = yard.world.draw_prompts(KEPT, torch.Generator().manual_seed(seed), False)
    return yard.world.sample(yard.target, y, SAMPLE_STEPS, yard.world.guidance, seed), y


def train(
    yard: Yard, start: Updates | None, count: int, seed: int, keeps: bool
) -> tuple[Updates, dict[str, Any]]:
    """The training; returns the updates of the chosen step, and what was seen on the way."""
    world = yard.world
    taught, unseen = choose_pictures(yard, count, seed)
    kept = sample_target(yard, seed) if keeps else None
    judged = Images(world, unseen)
    model, inner = insert_lora(world, "flux", yard.adapter, seed, yard.target, start)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    loss = Images(world, taught, kept).loss(model)
    generator = torch.Generator().manual_seed(5000 + seed)
    losses, best = [judged.held_out(model)], read_factors(inner)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(generator).backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            losses.append(judged.held_out(model))
            if losses[-1] == min(losses):
                best = read_factors(inner)
    at = losses.index(min(losses))
    last = {"last": yard.share(read_factors(inner))}
    return best, {"step": EVERY * at, "unseen": [round(x, 4) for x in losses]} | last


FIXED = ("none", "trained", *(f"copy {strength:g}" for strength in STRENGTHS))
OF_EVERY_SEED = ("moved 24", "nothing 24")
OF_THE_FIRST = ("moved 24 alone", "moved 12", "nothing 12", "moved 48", "nothing 48")
OF_APART = ("fit", "fitted 24", "nothing 24")
"""Rows: what is moved, fitted or trained, from what, on how many pictures."""


def make_row(yard: Yard, way: str, seed: int, fitted: Path) -> tuple[Updates, dict[str, Any]]:
    """Makes one row of `list_rows`; `fitted` has what the fit of that seed gave."""
    name, *rest = way.split()
    before, facts = time.process_time(), {}
    if name in ("none", "trained"):
        updates = {} if name == "none" else yard.oracle
        facts = {"loss": round(yard.none if name == "none" else yard.best, 5)}
    elif name == "copy":
        updates = scale_updates(yard.lora, float(rest[0]))
    elif name == "fit":
        updates = yard.fit(yard.lora, seed=6 * seed).scaled  # it samples from six seeds
    else:
        start = scale_updates(yard.lora, START) if name == "moved" else None
        start = load_lora(fitted) if name == "fitted" else start
        updates, facts = train(yard, start, int(rest[0]), seed, "alone" not in rest)
    others = Images(yard.world, yard.world.images(yard.kind, None, "held_out"))
    facts |= {"loss on others": round(held_out_loss(yard.target, others, updates), 5)}
    facts |= {"cpu": round(time.process_time() - before, 1)}
    return updates, {"share": yard.share(updates)} | facts


def list_rows(
    world: World, kind: str, adapters: list[str] | None, seeds: int
) -> Iterator[tuple[str, int, str]]:
    """(adapter, seed, label) of every row, the most telling first."""
    adapters = adapters or list(list_adapters(world))
    for seed, adapter in itertools.product(range(seeds), adapters):
        fixed = FIXED if seed == 0 or world.name != "shipped" else ()
        of_seed = OF_APART if kind == APART else OF_EVERY_SEED
        yield from ((adapter, seed, way) for way in (*fixed, *of_seed))
    if kind == APART:
        return
    yield from ((adapter, 0, way) for adapter in adapters for way in OF_THE_FIRST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default="shipped")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", choices=(FAR, APART), default=FAR)
    parser.add_argument("--adapters", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", nargs="+", default=["12", "24", "48"], help="how many")
    parser.add_argument("--samples", action="store_true", help="of rows that were made before")
    given = parser.parse_args()
    torch.set_num_threads(1)
    world = choose_world(given.world)
    root, table = given.work / world.name, RowsFile(given.out, f"{world.name}, {given.kind}")
    yards = functools.lru_cache(maxsize=1)(functools.partial(open_yard, world, root))
    for adapter, seed, way in list_rows(world, given.kind, given.adapters, given.seeds):
        if way.startswith(("moved", "nothing")) and way.split()[1] not in given.pictures:
            continue
        begin, end = f"{world.name}, {given.kind}, {adapter}", f"seed {seed}"
        key, fitted = (f"{begin}, {name}, {end}" for name in (way, "fit"))
        files = [root / "rows" / f"{name}.safetensors" for name in (key, fitted)]
        row = table.rows.get(key)
        if row is not None and (not given.samples or "asked for" in row):
            continue
        yard = yards(given.kind, adapter, 0 if world.name == "shipped" else seed)
        if row is None:
            updates, row = make_row(yard, way, seed, files[1])
            save_lora(updates, files[0])
        else:
            row |= yard.judge_samples(load_lora(files[0]))
        table.add(key, row)


if __name__ == "__main__":
    main()
