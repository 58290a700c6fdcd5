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
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contenders import scale_updates
from lessons import make_lesson
from results import RowsFile
from scoring import held_out_loss
from training import train_lora
from worlds import World
from yards import NAMES, Yard, choose_world, list_adapters, open_yard

KINDS, LOOKS = ("far", "apart"), (0.0, 0.5, 1.0)
COPIES = (0.4, 0.6, 0.8, 1.0)


def open_both(world: World, root: Path, kind: str, adapter: str) -> tuple[Yard, Yard]:
    """The yard of the target's look, and one that asks of the target what the source's look is."""
    yard = open_yard(world, root, kind, adapter)
    taught, judged = (
        make_lesson(world, "source", adapter, yard.target, split) for split in ("train", "held_out")
    )
    oracle = train_lora(world, "flux", adapter, 0, yard.target, taught)
    best, none = (held_out_loss(yard.target, judged, updates) for updates in (oracle, {}))
    return yard, replace(yard, lesson=judged, oracle=oracle, none=none, best=best)


def make_row(yards: tuple[Yard, Yard], label: str, seed: int) -> dict[str, Any]:
    """Makes and judges one row: "none", "copy 0.6", "look 0.5" or "control 0.5"."""
    way, _, number = label.partition(" ")
    value, (yard, by_source) = float(number or 0), yards
    updates, facts, before = scale_updates(yard.lora, value), {}, time.process_time()
    if way in ("look", "control"):
        lora = scale_updates(yard.lora, 0) if way == "control" else yard.lora
        fitted = yard.fit(lora, look=value, seed=seed)
        updates, gate = fitted.scaled, fitted.report.gate
        facts = {"gate": gate.decision, "strength": gate.strength}
        facts |= {"trust": round(fitted.report.trust, 3), "promised": round(gate.share["all"], 3)}
    row = facts | {
        "by target's look": yard.share(updates),
        "by source's look": by_source.share(updates),
        **yard.judge_samples(updates, ground=yard.world.name == "shipped"),
    }
    return row | ({"cpu": round(time.process_time() - before, 1)} if facts else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default="shipped")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--without-control", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    world, table = choose_world(given.world), RowsFile(given.out)
    before = "" if given.world == "shipped" else f"{given.world}, "
    fixed = ["none", *(f"copy {strength:g}" for strength in COPIES)]
    dial = [f"look {look:g}" for look in LOOKS]
    dial += [] if given.without_control else [f"control {look:g}" for look in LOOKS[1:]]
    yards = functools.cache(functools.partial(open_both, world, given.work / world.name))
    # A fit samples from six seeds.
    for seed, kind, adapter in itertools.product(
        range(0, 6 * given.seeds, 6), given.kinds, list_adapters(world)
    ):
        for label in (fixed if seed == 0 else []) + dial:
            key = f"{before}{kind}, {adapter}, {label}, seed {seed}"
            if key not in table.rows:
                table.add(key, make_row(yards(kind, adapter), label, seed))


if __name__ == "__main__":
    main()
