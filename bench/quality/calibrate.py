"""Writes what `prolora advise` expects: ``python bench/quality/calibrate.py``.

It reads every bench/results/quality*.json and writes python/prolora/comparison/calibration.json:
the mean and the interval of every class of pairs, and how those of one world do in the other. Of
students.json it reads what is distant, of which the others have one kind; the rest of the students
judge what is expected.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import git, recovered

from prolora import Verdict
from prolora.comparison.expectation import (
    DISTANT,
    WANTS,
    Expectation,
    classify,
    expect_shares,
)

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
OUT = ROOT / "python" / "prolora" / "comparison" / "calibration.json"
WORLDS = {"quality": "digits", "students": "digits"}
METHODS = {
    "copy": "copy @ 1",
    "copy, weakened": "copy, automatic strength",
    "auto": "auto",
    "blocks": "blocks 0.9 @ 1",
    "prolora": "prolora 0.99 @ 1",
    "lora-x": "lora-x 0.9 @ 1",
    "subspace": "subspace 0.9 @ 1",
}
PRUNED = ("pruned", "renumbered")
"""Kinds of target that lack blocks of the source."""
TAIL = 0.1
PAD = 0.1
"""By so much an interval is widened at each end for what one world does not know of another."""

Share = tuple[str, str, str, float]
"""World, class, kind and network, and what was recovered."""


def list_results(folder: Path) -> list[Path]:
    """The study's results, those of the students last."""
    students = folder / "students.json"
    return [*sorted(folder.glob("quality*.json")), *([students] if students.exists() else [])]


def collect_shares(folder: Path, method: str, want: str) -> list[Share]:
    """What a method recovers, for every LoRA and target that was scored."""
    found = []
    sizes_by_world: dict[str, dict[str, float]] = {}
    for path in list_results(folder):
        world = WORLDS.get(path.stem, path.stem.removeprefix("quality_"))
        results = json.loads(path.read_text())
        sizes_by_world.setdefault(world, results.get("sizes", {}))
        for row in results["rows"]:
            scored = row if want == "look" else row.get("own")
            share = recovered(scored, METHODS[method]) if scored and row["verdict"] else None
            if share is not None and math.isfinite(share):
                facts = (row["verdict"][name] for name in ("drift", "cosine", "spread"))
                size = sizes_by_world.get(world, {}).get(row["adapter"])
                verdict = Verdict(*facts, size=size if row["arch"] == "flux" else None)
                group = classify(verdict, row["kind"] in PRUNED)
                if path.stem != "students" or group == DISTANT:
                    found.append((world, group, f"{row['kind']} {row['arch']}", share))
    return found


def check_expected(rows: Sequence[tuple[float, dict[str, Any]]]) -> tuple[str, str]:
    """What is expected of `auto` on bases judged elsewhere, and how many shares are as expected.

    Args:
        rows: what `auto` recovered, and the numbers of the verdict.
    """
    found: list[tuple[float, Expectation]] = []
    for share, facts in rows:
        verdict = Verdict(*(facts[name] for name in ("drift", "cosine", "spread", "size")))
        expected = expect_shares(verdict)
        found += [(share, e) for e in expected if (e.method, e.want) == ("auto", "look")]
    if not found:
        return "–", "–"
    inside = sum(one.low <= share <= one.high for share, one in found)
    mean = sum(one.share for _, one in found) / len(found)
    return f"{mean:.2f}", f"{inside} of {len(found)}"


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


def summarise(shares: Sequence[Share], pad: float = PAD) -> tuple[float, float, float]:
    """Mean, low and high of one class; every kind counts the same, whatever its seeds."""
    kinds = Counter((world, kind) for world, _, kind, _ in shares)
    weights = [1 / kinds[world, kind] for world, _, kind, _ in shares]
    values = [share for *_, share in shares]
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
    low, high = (find_quantile(values, weights, level) for level in (TAIL, 1 - TAIL))
    return mean, low - pad, high + pad


def judge_worlds(shares: Sequence[Share], pad: float = PAD) -> dict[str, dict[str, float]]:
    """How the classes of the other worlds do in each: all kinds of it count the same."""
    checked = {}
    for world in dict.fromkeys(share[0] for share in shares):
        by_kind: dict[str, list[tuple[float, tuple[float, float, float]]]] = defaultdict(list)
        for _, group, kind, share in (s for s in shares if s[0] == world):
            others = [s for s in shares if s[0] != world and s[1] == group]
            if others:
                by_kind[kind].append((share, summarise(others, pad)))
        rows = list(by_kind.values())
        inside = [sum(low <= x <= high for x, (_, low, high) in row) / len(row) for row in rows]
        error = [sum(mean - x for x, (mean, *_) in row) / len(row) for row in rows]
        checked[world] = {
            "kinds": len(rows),
            "inside": round(sum(inside) / len(rows), 3),
            "error": round(sum(error) / len(rows), 3),
        }
    return checked


def expect(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Class -> what each method is expected to give, for each of WANTS."""
    expected: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for want in WANTS:
        for method in METHODS:
            shares = collect_shares(folder, method, want)
            for group in dict.fromkeys(share[1] for share in shares):
                some = [share for share in shares if share[1] == group]
                mean, low, high = (round(x, 2) for x in summarise(some))
                kinds = len({(world, kind.split(" ")[0]) for world, _, kind, _ in some})
                worlds = list(dict.fromkeys(share[0] for share in some))
                names = {"method": method, "want": want, "share": mean, "low": low, "high": high}
                expected[group].append(names | {"kinds": kinds, "worlds": worlds})
    return expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    checked = judge_worlds(collect_shares(options.results, "auto", "look"))
    for world, facts in checked.items():
        print(f"{world}, left out: {facts}")
    stored = {
        "made": {
            "script": "bench/quality/calibrate.py",
            "commit": git("rev-parse", "--short", "HEAD"),
            "from": [path.name for path in list_results(options.results)],
        },
        "checked": checked,
        "expected": expect(options.results),
    }
    text = json.dumps(stored, separators=(",", ":")).replace('{"method"', '\n{"method"')
    options.out.write_text(text + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
