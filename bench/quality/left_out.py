"""The rule by weights, fitted to one world and judged by the other: ``python left_out.py``.

With --sizes WORLD WORK the sizes of a study's LoRAs are written into its results first.

κ = a · drift · max(0, 1 − spread / b), with a and b from a coarse grid. No model is trained: what κ
gives is interpolated between the dampings that were measured. The tables go into docs/evidence.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate import RESULTS, collect_shares, judge_worlds
from evidence import fill_page, results_of
from restate import loss_at_damping
from results import COPIES, recovered, round_numbers
from safetensors.torch import load_file
from tables import format_table
from worlds import NAMES

from prolora import LowRank
from prolora.core.verdict import DAMPING, MIN_COSINE, MIN_DAMPING, NOISE_SPREAD

PAGE = Path(__file__).parents[2] / "docs/evidence.md"
FACTORS, SPREADS = (10, 20, 30, 40, 50, 60, 80), (0.3, 0.35, 0.4, 0.45, 0.5, 0.6)

Rule = Callable[[float, float], float]
"""(drift, spread) -> κ."""


@dataclass(frozen=True)
class Scored:
    """A LoRA on a target, by one yardstick."""

    kind: str
    verdict: dict[str, Any]
    row: dict[str, Any]

    def share_at(self, kappa: float) -> float | None:
        """What `damped` recovers, bounded by the largest κ that was measured."""
        losses = self.row["losses"]
        tried = [float(x.split(" ")[-1]) for x in losses if x.startswith("damped, κ ")]
        kappa = min(kappa, max(tried)) if kappa >= MIN_DAMPING else 0.0
        losses = losses | {"rule": loss_at_damping(losses, kappa)}
        return recovered(self.row | {"losses": losses}, "rule")


def read_world(world: str, want: str) -> dict[str, list[Scored]]:
    """Kind -> what was scored of related bases."""
    kinds = defaultdict(list)
    for row in json.loads(results_of(world).read_text())["rows"]:
        scored = row if want == "look" else row.get("own")
        if not row["verdict"] or row["verdict"]["cosine"] < MIN_COSINE or not scored:
            continue
        known = sum(label.startswith("damped, κ ") for label in scored["losses"])
        if known > 1 and recovered(scored, "copy @ 1") is not None:
            kinds[row["kind"]].append(Scored(row["kind"], row["verdict"], scored))
    return kinds


def compare(kinds: dict[str, list[Scored]], rule: Rule) -> dict[str, float]:
    """Kind -> the rule's mean share less that of the fixed copy that is best for the kind."""
    found = {}
    for kind, rows in kinds.items():
        shares = [row.share_at(rule(row.verdict["drift"], row.verdict["spread"])) for row in rows]
        best = max(_mean([recovered(row.row, label) for row in rows]) for label in COPIES)
        found[kind] = _mean(shares) - best
    return found


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def make_rule(factor: float, spread: float) -> Rule:
    """κ by drift and spread."""
    return lambda drift, found: factor * drift * max(0.0, 1 - found / spread)


def choose_rule(kinds: dict[str, list[Scored]]) -> tuple[float, float]:
    """The constants of the grid that are best in the mean over kinds."""
    return max(
        itertools.product(FACTORS, SPREADS),
        key=lambda chosen: _mean(list(compare(kinds, make_rule(*chosen)).values())),
    )


def rules_table() -> str:
    """Each world left out: what the rule of the other gives there, and what is shipped."""
    worlds = {name: read_world(name, "look") for name in NAMES}
    lines = []
    for world, kinds in worlds.items():
        (other,) = (name for name in worlds if name != world)
        a, b = choose_rule(worlds[other])
        rules = {
            "copy at 1": make_rule(0, 1),
            f"fitted to {other}: κ = {a} drift (1 − spread/{b})": make_rule(a, b),
            f"shipped: κ = {DAMPING:g} drift (1 − spread/{NOISE_SPREAD})": make_rule(
                DAMPING, NOISE_SPREAD
            ),
        }
        for name, rule in rules.items():
            found = compare(kinds, rule)
            worst = sorted(found, key=lambda kind: found[kind])[:2]
            told = ", ".join(f"{found[kind]:+.2f} ({kind})" for kind in worst)
            lines.append([world, name, f"{_mean(list(found.values())):+.3f}", told])
    return format_table(["left out", "rule", "− best copy, mean over kinds", "two worst"], lines)


def expectations_table() -> str:
    """Each world left out: how the intervals and means of the other do there."""
    lines = []
    for method in ("auto", "copy"):
        for want in ("look",):
            shares = collect_shares(RESULTS, method, want)
            for world, facts in judge_worlds(shares).items():
                inside, error = f"{facts['inside']:.0%}", f"{facts['error']:+.2f}"
                lines.append([world, method, str(facts["kinds"]), inside, error])
    head = ["left out", "method", "kinds", "inside", "expected − measured, mean"]
    return format_table(head, lines)


def measure_sizes(folder: Path) -> dict[str, float]:
    """LoRA of the transformers' source -> ‖ΔW‖/‖W‖ over its modules, the mean over seeds."""
    sizes: dict[str, list[float]] = defaultdict(list)
    base = load_file(folder / "source-0.safetensors")
    weights = {name.partition(".")[2]: weight for name, weight in base.items()}
    for path in sorted(folder.glob("source-*-*.safetensors")):
        lora = load_file(path)
        modules = [key.removesuffix(".down") for key in lora if key.endswith(".down")]
        updates = [LowRank(lora[f"{name}.up"], lora[f"{name}.down"]) for name in modules]
        own = math.fsum(float(update.norm()) ** 2 for update in updates)
        whole = math.fsum(float(weights[f"{name}.weight"].norm()) ** 2 for name in modules)
        sizes[path.stem.split("-")[-1]].append(math.sqrt(own / whole))
    return {name: math.fsum(found) / len(found) for name, found in sizes.items()}


def ratios_table() -> str:
    """Kinds by how far the target drifted, in sizes of the LoRA that is moved (transformers)."""
    lines = []
    for world in NAMES:
        results = json.loads(results_of(world).read_text())
        kinds = defaultdict(list)
        for row in results["rows"]:
            size, copied = results["sizes"].get(row["adapter"]), recovered(row, "copy @ 1")
            if row["arch"] == "flux" and row["verdict"] and size and copied is not None:
                facts = row["verdict"]
                if facts["cosine"] >= MIN_COSINE:
                    found = (facts["drift"] / size, facts["drift"], facts["spread"], copied)
                    kinds[row["kind"]].append(found)
        for kind, rows in kinds.items():
            means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
            lines.append((means[0], [kind, world, *(f"{x:.2f}" for x in means)]))
    head = ["target", "world", "drift / size of the LoRA", "drift", "spread", "copy at 1"]
    return format_table(head, [line for _, line in sorted(lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs=2, metavar=("WORLD", "WORK"))
    if given := parser.parse_args().sizes:
        path = results_of(given[0])
        results = json.loads(path.read_text())
        sizes = round_numbers(measure_sizes(Path(given[1]) / "flux"))
        results = {"made": results["made"], "sizes": sizes, "rows": results["rows"]}
        path.write_text(json.dumps(results, indent=0) + "\n")
    tables = {
        "left out": rules_table(),
        "expected elsewhere": expectations_table(),
        "drift in sizes": ratios_table(),
    }
    for table in tables.values():
        print(table, end="\n\n")
    PAGE.write_text(fill_page(PAGE.read_text(), tables))


if __name__ == "__main__":
    main()
