"""Measures the strength of every LoRA of a world: ``python bench/quality/measured.py --work DIR``.

DIR holds the models and adapters that study.py trained; it resumes. For each target one file
``ARCH/KIND-SEED-measured.json`` says what `prolora.probe.measure_strengths` reaches with the copy
and with `auto` on a few trajectories of the two models; it sees neither data nor oracles. With
--table it measures nothing, and collects what is there into bench/results: what the copy recovers
at the measured strength, beside the best fixed strength in hindsight. The loss there is
interpolated between those of study.py. The table goes into docs/evidence.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from contenders import CHOSEN, STRENGTHS, Case, Updates
from evidence import ROOT, fill_page
from guiding import guide_source
from jobs import Job, run_jobs
from models import Folder, load_lora
from probing import Sampler
from results import COPIES, KEYS, Row, Table, git, round_numbers
from scoring import cases
from study import targets
from tables import format_cell, format_table
from torch import nn
from two_worlds import order_kinds
from worlds import NAMES, World, load_world

from prolora.probe import MeasuredStrength, Trajectories, measure_strengths
from prolora.probe.recording.translation import Translation

IMAGES, STEPS = 4, 12
TRAJECTORIES = Trajectories(runs=6, moments=4)
LABEL = "copy, measured strength"
KEPT = (*COPIES, "auto", LABEL, "copy, measured on the LoRA's", "copy, measured on the target's")
"""The losses that are collected."""
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
        (
            Sampler(world, models[0], *rest, few=few),
            Sampler(world, models[1], *rest, few=students, guidance=guidance),
        ),
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


def collect_rows(work: Path) -> list[Row]:
    """A row for each target, adapter and yardstick ("look" or "own")."""
    rows = []
    for path in sorted(work.glob("*/*-measured.json")):
        kind, seed = path.name.removesuffix("-measured.json").rsplit("-", 1)
        scores = path.with_name(f"{kind}-{seed}-losses.json")
        scored = json.loads(scores.read_text()) if scores.exists() else {}
        for adapter, measured in json.loads(path.read_text()).items():
            names = {"arch": path.parent.name, "kind": kind, "seed": int(seed), "adapter": adapter}
            way = measured["ways"]["copy"]
            figures = {key: way[key] for key in ("strength", "share", "strength_interval", "go")}
            figures |= {"disagreement": measured["disagreement"], "seconds": measured["seconds"]}
            for want in ("look", "own"):
                part = scored.get(adapter, {})
                part = part if want == "look" else part.get("own")
                # A few-step adapter has no images of its own.
                if part and not (want == "own" and adapter == "fewstep"):
                    row = names | {"want": want} | add_measured(part, measured)
                    row["losses"] = {k: row["losses"][k] for k in KEPT if k in row["losses"]}
                    rows.append(round_numbers(row | {"measured": figures}))
    return rows


def collect(work: Path, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that are there, and the kept ones that were not measured again."""
    keys = (*KEYS, "want")
    rows = [*kept.get("rows", []), *collect_rows(work)]
    made = {
        "script": "bench/quality/measured.py",
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": git("log", "-1", "--format=%cs"),
        "torch": torch.__version__,
    }
    return {"made": made, "rows": list({tuple(r[k] for k in keys): r for r in rows}.values())}


def measured_table(table: Table) -> str:
    """What the copy recovers at 1, at its best fixed strength, and at the measured ones."""
    lines = []
    for kind in order_kinds(table):
        for want in ("look", "own"):
            part = table.where(kind=kind, want=want)
            fixed = part.best_copy()
            if not part.rows or part.difference(LABEL, fixed) is None:
                continue
            shares = [format_cell(part.share(label)) for label in ("copy @ 1", fixed, LABEL)]
            shares[1] += f" at {fixed.removeprefix('copy @ ')}"
            strengths = [row["measured"]["strength"] for row in part.rows]
            span = f"{min(strengths):.2f} … {max(strengths):.2f}"
            differences = [format_cell(part.difference(LABEL, x)) for x in ("copy @ 1", fixed)]
            lines.append([kind, want, *shares, span, *differences])
    head = ["target", "judged by", "copy at 1", "copy at its best", "at the measured strength"]
    return format_table([*head, "strengths", "measured − copy at 1", "measured − best copy"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default=NAMES[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of study.py")
    parser.add_argument("--table", action="store_true", help="collect what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        run_jobs(measuring_jobs(load_world(options.world), options.work))
        return
    file = ROOT / f"bench/results/measured_{options.world}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    collected = collect(options.work, kept)
    file.write_text(json.dumps(collected, indent=0) + "\n")
    page = ROOT / "docs/evidence.md"
    table = measured_table(Table(collected["rows"]))
    page.write_text(fill_page(page.read_text(), {f"measured {options.world}": table}))


if __name__ == "__main__":
    main()
