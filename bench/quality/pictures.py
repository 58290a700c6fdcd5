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
import datetime
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import STRENGTHS, Updates, scale_updates
from fitted_icons import FIT, IMAGES, SAMPLER_STEPS, Yard, choose_world, measure
from jobs import run_jobs
from judge import hits
from lessons import Images
from models import Folder, load_lora, save_lora
from results import git
from scoring import SAMPLE_STEPS, apply_updates, held_out_loss, sample_images
from study import judge_job, load_judge, training_jobs
from training import insert_lora, read_factors
from world_side import fit_lora
from worlds import NAMES, Data, World, load_world

from prolora import fitting as probe

FAR, APART = "far", "apart"
START, STEPS, RATE, EVERY = 0.6, 120, 2e-3, 10
KEPT = 96
SHOWN = 144
"""Rows of the held-out loss: each held-out picture at several levels of noise."""


def open_yard(world: World, root: Path, kind: str, adapter: str, seed: int) -> Yard:
    """A LoRA and a target of that seed; of the shipped icons there is one."""
    if world.name == "icons":
        return measure(kind, adapter, root / f"{kind}-{adapter}.safetensors")
    folder = Folder(world, root, "flux")
    bases = [folder.model_path("source", 0), folder.model_path(kind, seed)]
    loras = [folder.lora_path(k, seed, a) for k in ("source", kind) for a in list_adapters(world)]
    run_jobs([job for job in training_jobs(world, root) if job.path in (*bases, *loras)])
    source, target = folder.load_source(kind, seed), folder.load_model(kind, seed)
    lora, oracle = (load_lora(folder.lora_path(k, seed, adapter)) for k in ("source", kind))
    lesson = folder.lesson(kind, seed, adapter, "held_out")
    with apply_updates(target, oracle):
        best = lesson.held_out(target)
    none = lesson.held_out(target)
    return Yard(kind, adapter, source, target, lora, lesson, oracle, none, best)


def list_adapters(world: World) -> tuple[str, ...]:
    """Those that pictures can teach."""
    return tuple(adapter for adapter in world.adapters if adapter != "fewstep")


def choose_pictures(world: World, yard: Yard, count: int, seed: int) -> tuple[Data, Data]:
    """Pictures to learn from, and the held-out quarter at several levels of noise."""
    x, y = world.images(yard.kind, yard.adapter, "train")
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(9000 + seed))[:count]
    unseen, seen = rows[: count // 4], rows[count // 4 :]
    unseen = unseen.repeat(SHOWN // len(unseen))
    return (x[seen], y[seen]), (x[unseen], y[unseen])


@functools.lru_cache(maxsize=2)
def sample_target(world_name: str, yard: Yard, seed: int) -> Data:
    """What the target draws without a LoRA."""
    world = choose_world() if world_name == "icons" else load_world(world_name)
    y = world.draw_prompts(KEPT, torch.Generator().manual_seed(seed), False)
    return world.sample(yard.target, y, SAMPLE_STEPS, world.guidance, seed), y


def train(
    world: World, yard: Yard, start: Updates | None, count: int, seed: int, keeps: bool
) -> tuple[Updates, dict[str, Any]]:
    """The training; returns the updates of the chosen step, and what was seen on the way."""
    taught, unseen = choose_pictures(world, yard, count, seed)
    kept = sample_target(world.name, yard, seed) if keeps else None
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
    last = {"last": yard_share(yard, read_factors(inner))}
    return best, {"step": EVERY * at, "unseen": [round(x, 4) for x in losses]} | last


def fit_to_target(world: World, yard: Yard, seed: int) -> Updates:
    """What a fit gives that has no pictures; it samples from six seeds."""
    prefix = world.prefix["flux"]
    sampled = {"images": IMAGES, "steps": SAMPLER_STEPS, "seed": 6 * seed}
    settings = probe.FitSettings(**{"rank": 32} | FIT | sampled)
    updates = {f"{prefix}{name}": update for name, update in yard.lora.items()}
    fitted = fit_lora(world, (yard.source, yard.target), updates, yard.adapter, settings)
    return {name.removeprefix(prefix): update for name, update in fitted.scaled.items()}


def yard_share(yard: Yard, updates: Updates) -> float:
    """The share of the held-out loss that updates recover."""
    loss = held_out_loss(yard.target, yard.lesson, updates)
    return round((yard.none - loss) / (yard.none - yard.best), 4)


def judge_samples(world: World, root: Path, yard: Yard, updates: Updates) -> dict[str, float]:
    """What a classifier sees in samples."""
    with apply_updates(yard.target, updates):
        images, y = sample_images(world, yard.kind, yard.target, yard.adapter, seed=0)
    _, content, style, _ = open_judge(world.name, root)(images)
    of_concept = torch.full_like(y, world.concept_class)
    asked = of_concept if yard.adapter == "concept" else world.content(y)
    row = {"asked for": hits(content, asked)}
    if yard.adapter != "concept":
        wanted = 1 + world.adapters.index(yard.adapter)
        row["in the LoRA's style"] = hits(style, torch.tensor(wanted))
    return {name: round(value, 4) for name, value in row.items()}


@functools.cache
def open_judge(world: str, root: Path):
    """The classifier of a world, trained once."""
    run_jobs([judge_job(load_world(world), root)])
    return load_judge(load_world(world), root)


FIXED = ("none", "trained", *(f"copy {strength:g}" for strength in STRENGTHS))
OF_EVERY_SEED = ("moved 24", "nothing 24")
OF_THE_FIRST = ("moved 24 alone", "moved 12", "nothing 12", "moved 48", "nothing 48")
OF_APART = ("fit", "fitted 24", "nothing 24")
"""Rows: what is moved, fitted or trained, from what, on how many pictures."""


def make_row(
    world: World, yard: Yard, way: str, seed: int, fitted: Path
) -> tuple[Updates, dict[str, Any]]:
    """Makes one row of `list_rows`; `fitted` has what the fit of that seed gave."""
    name, *rest = way.split()
    before, facts = time.process_time(), {}
    if name in ("none", "trained"):
        updates = {} if name == "none" else yard.oracle
        facts = {"loss": round(yard.none if name == "none" else yard.best, 5)}
    elif name == "copy":
        updates = scale_updates(yard.lora, float(rest[0]))
    elif name == "fit":
        updates = fit_to_target(world, yard, seed)
    else:
        start = scale_updates(yard.lora, START) if name == "moved" else None
        start = load_lora(fitted) if name == "fitted" else start
        updates, facts = train(world, yard, start, int(rest[0]), seed, "alone" not in rest)
    others = Images(world, world.images(yard.kind, None, "held_out"))
    facts |= {"loss on others": round(held_out_loss(yard.target, others, updates), 5)}
    facts |= {"cpu": round(time.process_time() - before, 1)}
    return updates, {"share": yard_share(yard, updates)} | facts


def list_rows(
    world: World, kind: str, adapters: list[str] | None, seeds: int
) -> Iterator[tuple[str, int, str]]:
    """(adapter, seed, label) of every row, the most telling first."""
    adapters = adapters or list(list_adapters(world))
    for seed, adapter in itertools.product(range(seeds), adapters):
        fixed = FIXED if seed == 0 or world.name != "icons" else ()
        of_seed = OF_APART if kind == APART else OF_EVERY_SEED
        yield from ((adapter, seed, way) for way in (*fixed, *of_seed))
    if kind == APART:
        return
    yield from ((adapter, 0, way) for adapter in adapters for way in OF_THE_FIRST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default="icons")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", choices=(FAR, APART), default=FAR)
    parser.add_argument("--adapters", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", nargs="+", default=["12", "24", "48"], help="how many")
    parser.add_argument("--samples", action="store_true", help="of rows that were made before")
    given = parser.parse_args()
    torch.set_num_threads(1)
    world = choose_world() if given.world == "icons" else load_world(given.world)
    root = given.work / world.name
    table = json.loads(given.out.read_text()) if given.out.exists() else {"made": {}, "rows": {}}
    table["made"][f"{world.name}, {given.kind}"] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": str(datetime.datetime.now().date()),
        "torch": torch.__version__,
    }
    yards = functools.lru_cache(maxsize=1)(functools.partial(open_yard, world, root))
    for adapter, seed, way in list_rows(world, given.kind, given.adapters, given.seeds):
        if way.startswith(("moved", "nothing")) and way.split()[1] not in given.pictures:
            continue
        begin, end = f"{world.name}, {given.kind}, {adapter}", f"seed {seed}"
        key, fitted = (f"{begin}, {name}, {end}" for name in (way, "fit"))
        files = [root / "rows" / f"{name}.safetensors" for name in (key, fitted)]
        row = table["rows"].get(key)
        if row is not None and (not given.samples or "asked for" in row):
            continue
        yard = yards(given.kind, adapter, 0 if world.name == "icons" else seed)
        if row is None:
            updates, row = make_row(world, yard, way, seed, files[1])
            files[0].parent.mkdir(parents=True, exist_ok=True)
            save_lora(updates, files[0])
        else:
            row |= judge_samples(world, root, yard, load_lora(files[0]))
        table["rows"][key] = row
        print(key, row, flush=True)
        given.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
