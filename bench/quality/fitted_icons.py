"""The fit on the shipped icons: ``python bench/quality/fitted_icons.py --label NAME --out FILE``.

Models and LoRAs are those of examples/icon_family. The score is the share of the held-out loss
between no LoRA and one trained on the target for 90 steps (as in slice_icons.py) that is recovered,
at strength 1. Rows of FILE under the same label are replaced, so that fits of several states of the
library lie side by side; --options gives fields of `probe.FitSettings`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

from contenders import Updates
from icons.shipped import load_lora, load_model
from lessons import Lesson, make_lesson
from models import load_lora as read_updates
from models import save_lora
from scoring import apply_updates
from torch import nn
from training import train_lora
from world_side import fit_lora
from worlds import World, load_world

from prolora import fitting as probe

ROWS = (*(("apart", x) for x in ("neon", "duotone", "concept")),)
ROWS += (("pruned", "neon"), ("pruned", "concept"))
IMAGES, SAMPLER_STEPS, ORACLE_STEPS = 24, 10, 90
FIT = {"probes": 768, "held_out": 24, "batch": 48, "fit_steps": 16, "force": True, "seed": 0}


@functools.cache
def choose_world() -> World:
    """The icons, with LoRAs trained for ORACLE_STEPS."""
    world = load_world("icons")
    budgets = world.budgets | {"lora": (ORACLE_STEPS, world.budgets["lora"][1])}
    return dataclasses.replace(world, budgets=budgets)


@dataclasses.dataclass(frozen=True, eq=False)
class Yard:
    """One LoRA and one target, and how results are judged."""

    kind: str
    adapter: str
    source: nn.Module
    target: nn.Module
    lora: Updates
    lesson: Lesson
    oracle: Updates
    none: float
    best: float


@functools.cache
def measure(kind: str, adapter: str, kept: Path | None = None) -> Yard:
    """Trains the LoRA that sets the scale, or reads the one that `kept` has."""
    world = choose_world()
    source, target, lora = load_model("source"), load_model(kind), load_lora(adapter)
    with apply_updates(source, lora) as teacher:
        taught, judged = (
            make_lesson(world, kind, adapter, target, split, teacher=teacher)
            for split in ("train", "held_out")
        )
    if kept is not None and kept.exists():
        oracle = read_updates(kept)
    else:
        oracle = train_lora(world, "flux", adapter, 0, target, taught)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_lora(oracle, kept)
    with apply_updates(target, oracle):
        best = judged.held_out(target)
    none = judged.held_out(target)
    return Yard(kind, adapter, source, target, lora, judged, oracle, none, best)


def fit(kind: str, adapter: str, options: dict[str, Any]) -> dict:
    """One row of the table."""
    yard = measure(kind, adapter)
    world, source, target = choose_world(), yard.source, yard.target
    prefix = world.prefix["flux"]
    drawn = {"images": IMAGES, "steps": SAMPLER_STEPS}
    known = {"rank": 32} | FIT | drawn | options
    before = time.process_time()
    updates = {f"{prefix}{name}": update for name, update in yard.lora.items()}
    settings = probe.FitSettings(**known)
    result = fit_lora(world, (source, target), updates, adapter, settings)
    seconds = time.process_time() - before
    verdict = result.report.gate
    fitted = {name.removeprefix(prefix): u for name, u in result.updates.items()}
    with apply_updates(target, fitted):
        score = (yard.none - yard.lesson.held_out(target)) / (yard.none - yard.best)
    return {
        "target": kind,
        "adapter": adapter,
        "start": result.report.start,
        "rank": max(u.rank for u in fitted.values()),
        "steps": len(result.report.steps),
        "score": round(score, 4),
        "share": round(verdict.share["all"], 4),
        "history": [round(share, 3) for share in result.report.steps],
        "fit_seconds": round(result.report.seconds["fit"], 1),
        "processor_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--label", default="")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="of FitSettings, as JSON")
    arguments = parser.parse_args()
    for row in ROWS:
        done = fit(*row, arguments.options)
        print(done, flush=True)
        table = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        rows = [r for r in table.get(arguments.label, []) if r["row"] != list(row)]
        table[arguments.label] = [*rows, {"row": row, "options": arguments.options} | done]
        arguments.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
