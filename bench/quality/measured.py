"""Measures the strength of every LoRA of a world: ``python bench/quality/measured.py --work DIR``.

DIR holds the models and adapters that study.py trained; it resumes. For each target one file
``ARCH/KIND-SEED-measured.json`` says what `prolora.probe.measure_strengths` reaches with the copy
and with `auto` on a few trajectories of the two models; it sees neither data nor oracles. With
--table it prints what the copy recovers at the measured strength, beside the best fixed strength in
hindsight; the loss there is interpolated between those of study.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from contenders import CHOSEN, STRENGTHS, Case, Updates
from imaged import guide_source
from jobs import Job, run_jobs
from models import Folder, load_lora
from probing import Sampler
from results import Row, Table, recovered
from scoring import cases
from study import targets
from torch import nn
from worlds import NAMES, World, load_world

from prolora.probe import MeasuredStrength, Trajectories, measure_strengths
from prolora.probe.recording.translation import Translation

IMAGES, STEPS = 4, 12
TRAJECTORIES = Trajectories(runs=6, moments=4)
LABEL = "copy, measured strength"
BY_ORIGIN = {"adapted": "copy, measured on the LoRA's", "target": "copy, measured on the target's"}


def measure(
    folder: Folder,
    kind: str,
    seed: int,
    adapter: str,
    models: tuple[nn.Module, nn.Module],
    case: Case,
) -> dict[str, Any]:
    """What the copy and `auto` reach on a target's own trajectories and the LoRA's."""
    world, prefix = folder.world, folder.world.prefix[folder.arch]
    few = adapter == "fewstep"
    guidance = world.guidance_of(kind)
    students = few or world.distilled.get(kind) == "lines"
    rest = (adapter, IMAGES, STEPS)

    def place(updates: Updates) -> Updates:
        return {prefix + name: update for name, update in updates.items()}

    ways, auto = {"copy": place(case.updates)}, CHOSEN["auto"](case)
    if auto and any(not same(auto.get(n), u) for n, u in case.updates.items()):
        ways["auto"] = place(auto)
    started = time.process_time()
    measured = measure_strengths(
        *models,
        place(load_lora(folder.source_lora_path(kind, seed, adapter))),
        ways,
        Sampler(world, models[0], *rest, few=few),
        Sampler(world, models[1], *rest, few=students, guidance=guidance),
        translation=Translation(guidance=guide_source(world, models[0], kind, adapter)),
        trajectories=TRAJECTORIES,
    )
    return {
        "disagreement": measured.disagreement,
        "calls": measured.calls,
        "seconds": round(time.process_time() - started, 1),
        "best": measured.best,
        "ways": {name: describe(way) for name, way in measured.candidates.items()},
    }


def same(a: Any, b: Any) -> bool:
    """Whether two updates are equal."""
    return a is not None and torch.equal(a.up, b.up) and torch.equal(a.down, b.down)


def describe(way: MeasuredStrength) -> dict[str, Any]:
    """As JSON."""
    shares = {f"{strength:g}": share for strength, share in way.shares.items()}
    return vars(way) | {"shares": shares, "go": way.go}


def score_measured(folder: Folder, kind: str, seed: int, out: Path) -> None:
    """The file of one target."""
    world = folder.world
    models = folder.load_source(kind, seed), folder.load_model(kind, seed)
    known = world.adapters_for(kind)
    loras = {a: load_lora(folder.source_lora_path(kind, seed, a)) for a in known}
    table = {
        adapter: measure(folder, kind, seed, adapter, models, case)
        for adapter, case in cases(world, folder.arch, kind, *models, loras).items()
        if case.updates
    }
    out.write_text(json.dumps(table, indent=1))


def measuring_jobs(world: World, work: Path) -> list[Job]:
    """A job for every target whose models and adapters are there."""
    jobs = []
    for arch, kind, seed in targets(world):
        folder = Folder(world, work, arch)
        needs = [folder.model_path(world.source_of(kind), seed), folder.model_path(kind, seed)]
        needs += [folder.source_lora_path(kind, seed, a) for a in world.adapters_for(kind)]
        if all(path.exists() for path in needs):
            out = work / arch / f"{kind}-{seed}-measured.json"
            run = functools.partial(score_measured, folder, kind, seed)
            jobs.append(Job(out, tuple(needs), run))
    return jobs


def interpolate_loss(none: float, losses: Mapping[str, float], strength: float) -> float | None:
    """The loss of the copy at any strength: a parabola through the three nearest known ones."""
    known = [(0.0, none)] + [
        (s, losses[f"copy @ {s:g}"]) for s in STRENGTHS if f"copy @ {s:g}" in losses
    ]
    if len(known) < 3:
        return None
    nearest = sorted(known, key=lambda point: abs(point[0] - strength))[:3]
    total = 0.0
    for i, (x, y) in enumerate(nearest):
        others = [z for j, (z, _) in enumerate(nearest) if j != i]
        total += y * math.prod((strength - z) / (x - z) for z in others)
    return total


def add_measured(scored: Row, measured: Mapping[str, Any]) -> Row:
    """Losses with those of the copy at its measured strengths."""
    way, losses = measured["ways"]["copy"], dict(scored["losses"])
    strengths = {LABEL: way["strength"]} | {
        label: way["by_origin"][origin][0] for origin, label in BY_ORIGIN.items()
    }
    for label, strength in strengths.items():
        losses[label] = interpolate_loss(scored["none"], losses, strength)
    return {"none": scored["none"], "oracle": scored["oracle"], "losses": losses}


def collect_rows(work: Path) -> dict[str, list[Row]]:
    """By what is wanted ("look" or "own"), a row for each target and adapter."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for path in sorted(work.glob("*/*-measured.json")):
        kind, seed = path.name.removesuffix("-measured.json").rsplit("-", 1)
        scores = path.with_name(f"{kind}-{seed}-losses.json")
        scored = json.loads(scores.read_text()) if scores.exists() else {}
        for adapter, measured in json.loads(path.read_text()).items():
            names = {"arch": path.parent.name, "kind": kind, "seed": int(seed), "adapter": adapter}
            for want in ("look", "own"):
                part = scored.get(adapter, {})
                part = part if want == "look" else part.get("own")
                if part:
                    rows[want].append(names | add_measured(part, measured) | {"measured": measured})
    return rows


def show_table(rows: list[Row], title: str) -> None:
    """What the copy recovers at 1, at its best fixed strength, and at the measured ones."""
    print(f"\n{title}: copy at 1, best fixed in hindsight, measured, its difference; strengths")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        table = Table(rows).where(kind=kind)
        fixed = table.best_copy()
        shares = [table.share(label) for label in ("copy @ 1", fixed, LABEL, *BY_ORIGIN.values())]
        difference = table.difference(LABEL, fixed)
        if difference is None or None in shares:
            continue
        means = " ".join(f"{share[0]:6.2f}" for share in shares if share)
        mean, low, high = difference
        strengths = [row["measured"]["ways"]["copy"]["strength"] for row in table.rows]
        span = f"{min(strengths):.2f} … {max(strengths):.2f}"
        print(f"{kind:18} {means}  {mean:5.2f} [{low:.2f}, {high:.2f}] ({fixed})  at {span}")
        for row in table.rows:
            way = row["measured"]["ways"]["copy"]
            print(
                f"    {row['arch']} {row['seed']} {row['adapter']:10}"
                f" measured {way['strength']:.2f}, share {way['share']:.2f},"
                f" recovers {recovered(row, LABEL) or math.nan:.2f}, at 1"
                f" {recovered(row, 'copy @ 1') or math.nan:.2f}, {fixed}"
                f" {recovered(row, fixed) or math.nan:.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default=NAMES[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of study.py")
    parser.add_argument("--table", action="store_true", help="show what is there, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        run_jobs(measuring_jobs(load_world(options.world), options.work))
    for want, rows in collect_rows(options.work).items():
        show_table(rows, {"look": "in the target's look", "own": "the LoRA's own images"}[want])


if __name__ == "__main__":
    main()
