"""Which look a fit brings along: ``python bench/quality/looks.py --out FILE [--kinds far apart]``.

The shipped icons, or with ``--world digits --work DIR`` digits that are trained there first, fitted
at look 0, ½ and 1. Each result is judged three ways: by the target's look
and by the look that the LoRA was made with, each as the share of the held-out loss between no LoRA
and one trained on the target for it; and by samples, in which a classifier counts what was asked
for, the LoRA's style and the source's plain ground. Beside them copies at four strengths, no LoRA,
and the same fit of a LoRA that changes nothing: what the dial alone does. Rows that FILE has are
not made again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from contenders import Updates, scale_updates
from fitted_icons import IMAGES, SAMPLER_STEPS, choose_world
from judge import Judge, hits, train_judge
from lessons import Lesson, make_lesson
from pictures import judge_samples, list_adapters, open_yard
from scoring import apply_updates, sample_images
from training import train_lora
from world_side import fit_lora
from worlds import NAMES, World, load_world

from prolora import LowRank
from prolora import fitting as probe

KINDS, LOOKS = ("far", "apart"), (0.0, 0.5, 1.0)
COPIES = (0.4, 0.6, 0.8, 1.0)
FIT = {"rank": 32, "probes": 768, "held_out": 24, "batch": 48, "fit_steps": 16, "force": True}
STYLE_OF = {"neon": 1, "duotone": 2}
"""Adapter -> the judge's class of its style; 0 is none."""


@functools.cache
def load_judge() -> Judge:
    """Some minutes of one core, once."""
    return train_judge(choose_world())


class Yard:
    """One LoRA on one target, and the two scales that it is judged by."""

    def __init__(self, world: World, root: Path, kind: str, adapter: str) -> None:
        self.world, self.root, self.kind, self.adapter = world, root, kind, adapter
        self.opened = opened = open_yard(world, root, kind, adapter, 0)
        self.source, self.target, self.lora = opened.source, opened.target, opened.lora
        self.scales = {
            "target": (opened.lesson, opened.none, opened.best),
            "source": self._measure("source"),
        }

    def _measure(self, of: str) -> tuple[Lesson, float, float]:
        """Trains on the target what one look asks for; returns the two ends of its scale."""
        world = self.world
        taught = make_lesson(world, of, self.adapter, self.target, "train")
        judged = make_lesson(world, of, self.adapter, self.target, "held_out")
        oracle = train_lora(world, "flux", self.adapter, 0, self.target, taught)
        with apply_updates(self.target, oracle):
            best = judged.held_out(self.target)
        return judged, judged.held_out(self.target), best

    def judge(self, updates: Updates) -> dict[str, float]:
        """Both shares, and what a classifier sees in samples."""
        row = {}
        if self.world.name != "icons":
            row = judge_samples(self.world, self.root, self.opened, updates)
        with apply_updates(self.target, updates):
            for look, (lesson, none, best) in self.scales.items():
                row[f"by {look}'s look"] = (none - lesson.held_out(self.target)) / (none - best)
            if row:
                return {name: round(value, 4) for name, value in row.items()}
            images, y = sample_images(self.world, self.kind, self.target, self.adapter, seed=0)
        _, content, style, ground = load_judge()(images)
        row["asked for"] = hits(content, self.world.content(y))
        if self.adapter in STYLE_OF:
            row["in the LoRA's style"] = hits(style, torch.tensor(STYLE_OF[self.adapter]))
        row["on the source's ground"] = hits(ground, torch.tensor(0))
        return {name: round(value, 4) for name, value in row.items()}


def fit(yard: Yard, lora: Updates, look: float, seed: int) -> dict[str, Any]:
    """Fits at one look; returns the updates as they would be written, and what the gate said."""
    world = yard.world
    prefix = world.prefix["flux"]
    settings = probe.FitSettings(**FIT, images=IMAGES, steps=SAMPLER_STEPS, look=look, seed=seed)
    updates = {f"{prefix}{name}": update for name, update in lora.items()}
    result = fit_lora(world, (yard.source, yard.target), updates, yard.adapter, settings)
    fitted = {name.removeprefix(prefix): u for name, u in result.scaled.items()}
    return {"updates": fitted, "gate": result.report.gate, "trust": result.report.trust}


def make_row(yard: Yard, label: str, seed: int) -> dict[str, Any]:
    """Makes and judges one row: "none", "copy 0.6", "look 0.5" or "control 0.5"."""
    way, _, number = label.partition(" ")
    value = float(number or 0)
    if way in ("none", "copy"):
        return yard.judge(scale_updates(yard.lora, value))
    lora = yard.lora
    if way == "control":
        lora = {name: LowRank(0 * update.up, update.down) for name, update in lora.items()}
    before = time.process_time()
    made = fit(yard, lora, value, seed)
    gate = made["gate"]
    facts = {"gate": gate.decision, "strength": gate.strength, "trust": round(made["trust"], 3)}
    facts |= {"promised": round(gate.share["all"], 3)}
    return facts | yard.judge(made["updates"]) | {"cpu": round(time.process_time() - before, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default="icons")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--without-control", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    world = choose_world() if given.world == "icons" else load_world(given.world)
    before = "" if given.world == "icons" else f"{given.world}, "
    table = json.loads(given.out.read_text()) if given.out.exists() else {}
    fixed = ["none", *(f"copy {strength:g}" for strength in COPIES)]
    dial = [f"look {look:g}" for look in LOOKS]
    dial += [] if given.without_control else [f"control {look:g}" for look in LOOKS[1:]]
    yards = functools.cache(functools.partial(Yard, world, given.work / world.name))
    # A fit samples from six seeds.
    for seed, kind, adapter in itertools.product(
        range(0, 6 * given.seeds, 6), given.kinds, list_adapters(world)
    ):
        for label in (fixed if seed == 0 else []) + dial:
            key = f"{before}{kind}, {adapter}, {label}, seed {seed}"
            if key not in table:
                table[key] = make_row(yards(kind, adapter), label, seed)
                print(key, table[key], flush=True)
                given.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
