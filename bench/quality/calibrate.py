"""What a copy at strength 1 gave, class by class: ``python bench/quality/calibrate.py``.

It reads the stored rows of both worlds, of the students and of terrain, adds what others measured
elsewhere, and prints the shares that `prolora.comparison.expectation.CLASSES` holds. Losses alone
count, and a kind of target counts the same however many LoRAs were scored on it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import recovered

from prolora.comparison.expectation import classify
from prolora.core.verdict import Verdict

RESULTS = Path(__file__).parents[2] / "bench" / "results"
WORLDS = {
    "digits": "quality",
    "icons": "quality_icons",
    "students": "students",
    "terrain": "terrain",
}
PRUNED = ("pruned", "renumbered")
"""Kinds of target that lack blocks of the source."""
FEW_STEP = ("few-step", "consistency", "matching")
"""How kinds of target begin that draw in few steps."""
ELSEWHERE = {
    "alike": (0.96,),
    "cut": (0.54, 0.68),
    "few-step": (0.55, 0.60, 0.62, 0.50, 0.43),
}
"""Class -> what others measured on nets that are not of this study, a number for each kind: a
continued net of a third party, and pruned ones and students of a world made by somebody else."""
TAIL = 0.1


def read_rows() -> list[tuple[str, str, dict[str, Any], Verdict]]:
    """World, kind of target, scored row and verdict, of every LoRA that was scored on a target."""
    stored = {w: json.loads((RESULTS / f"{f}.json").read_text()) for w, f in WORLDS.items()}
    sizes = {world: results.get("sizes", {}) for world, results in stored.items()}
    sizes["students"] = sizes["digits"]
    found = []
    for world, results in stored.items():
        for row in results["rows"]:
            if not (facts := row.get("verdict")):
                continue
            kind, size = row.get("kind") or row["direction"], facts.get("size")
            if row.get("arch") == "flux":
                size = sizes[world].get(row["adapter"])
            verdict = Verdict(*(facts[name] for name in ("drift", "cosine", "spread")), size)
            row |= {end: row["losses"][end] for end in ("none", "oracle") if end not in row}
            found.append((world, f"{kind} {row.get('arch', '')}", row, verdict))
    return found


def collect_shares() -> dict[str, list[tuple[str, float]]]:
    """Class -> (kind, share of training on the target) of every LoRA, copied at strength 1."""
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for world, kind, row, verdict in read_rows():
        share = recovered(row, "copy @ 1")
        if share is not None and math.isfinite(share):
            group = classify(verdict, kind.startswith(PRUNED), kind.startswith(FEW_STEP))
            found[group].append((f"{world} {kind}", share))
    for group, shares in ELSEWHERE.items():
        found[group] += [(f"elsewhere {i}", share) for i, share in enumerate(shares)]
    return found


def find_quantile(values: Sequence[float], weights: Sequence[float], level: float) -> float:
    """The value below which a share `level` of the weight lies, interpolated between values."""
    ordered = sorted(zip(values, weights, strict=True))
    total, below, before = math.fsum(weights), 0.0, None
    for value, weight in ordered:
        middle = (below + weight / 2) / total
        if middle >= level:
            if before is None or middle == before[0]:
                return value
            return before[1] + (level - before[0]) / (middle - before[0]) * (value - before[1])
        before, below = (middle, value), below + weight
    return ordered[-1][0]


def summarise(shares: Sequence[tuple[str, float]]) -> tuple[float, float, float]:
    """Low, mean and high of a class: a tenth of the LoRAs did worse, and a tenth did better."""
    counts: dict[str, int] = defaultdict(int)
    for kind, _ in shares:
        counts[kind] += 1
    weights, values = [1 / counts[kind] for kind, _ in shares], [share for _, share in shares]
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
    low, high = (find_quantile(values, weights, level) for level in (TAIL, 1 - TAIL))
    return round(low, 2), round(mean, 2), round(high, 2)


def main() -> None:
    for group, shares in collect_shares().items():
        low, mean, high = summarise(shares)
        kinds = len({kind for kind, _ in shares})
        print(f"{group}: low {low}, mean {mean}, high {high}; {kinds} kinds, {len(shares)} LoRAs")


if __name__ == "__main__":
    main()
