"""Writes what `prolora advise` expects: ``python bench/quality/calibrate.py``.

It reads every bench/results/quality*.json and writes python/prolora/comparison/calibration.json.
The scales of the kernel are those whose intervals do best on kinds of target that were left out,
in every world and architecture at once; how well they do is printed and kept in the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from results import git, recovered

from prolora.comparison.expectation import WANTS, Calibration, Expectation, Kernel

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
OUT = ROOT / "python" / "prolora" / "comparison" / "calibration.json"
WORLDS = {"quality": "digits"}
METHODS = {
    "copy": "copy @ 1",
    "copy, weakened": "copy, automatic strength",
    "auto": "auto",
    "blocks": "blocks 0.9 @ 1",
    "prolora": "prolora 0.99 @ 1",
    "lora-x": "lora-x 0.9 @ 1",
    "subspace": "subspace 0.9 @ 1",
}
DRIFTS, SPREADS = (0.3, 0.5, 0.7, 1.0), (0.05, 0.075, 0.1, 0.15, 0.2, 0.4)
TAIL, REACH = 0.1, 2.0


def collect_pairs(folder: Path) -> list[dict[str, Any]]:
    """Every pair of bases that was scored, with the shares of its LoRAs."""
    pairs: dict[tuple, dict[str, Any]] = {}
    for path in sorted(folder.glob("quality*.json")):
        world = WORLDS.get(path.stem, path.stem.removeprefix("quality_"))
        for row in json.loads(path.read_text())["rows"]:
            if not row["verdict"]:
                continue
            key = world, row["arch"], row["kind"], row["seed"]
            names = dict(zip(("world", "arch", "kind", "seed"), key, strict=True))
            facts = {name: row["verdict"][name] for name in ("drift", "cosine", "spread")}
            pair = pairs.setdefault(key, names | facts | {want: {} for want in WANTS})
            for want, scored in zip(WANTS, (row, row.get("own")), strict=True):
                add_shares(pair[want], scored)
    return [
        {name: value for name, value in pair.items() if value != {}}
        for pair in pairs.values()
        if pair["look"]
    ]


def add_shares(shares: dict[str, list[float]], scored: dict[str, Any] | None) -> None:
    """Appends what each method recovers by one yardstick."""
    if scored is None:
        return
    for method, label in METHODS.items():
        share = recovered(scored, label)
        if share is not None and math.isfinite(share):
            shares.setdefault(method, []).append(round(share, 3))


def check_kinds(
    calibration: Calibration, method: str = "copy", want: str = "look"
) -> Iterator[tuple[str, float, Expectation | None]]:
    """Kind, measured share, and what is expected of it from all other kinds."""
    for kind in dict.fromkeys(pair["kind"] for pair in calibration.pairs):
        others = [pair for pair in calibration.pairs if pair["kind"] != kind]
        rest = replace(calibration, pairs=others)
        for pair in calibration.pairs:
            if pair["kind"] == kind and method in pair.get(want, {}):
                expected = rest.expect(method, want, pair["drift"], pair["spread"])
                for share in pair[want][method]:
                    yield kind, share, expected


def summarise(calibration: Calibration, method: str = "copy") -> dict[str, float]:
    """How intervals do on kinds that were left out; all kinds count the same."""
    by_kind: dict[str, list] = defaultdict(list)
    for kind, share, expected in check_kinds(calibration, method):
        by_kind[kind].append((share, expected))
    rows = [
        (share, expected, 1 / len(several))
        for several in by_kind.values()
        for share, expected in several
    ]
    answered = [(share, expected, w) for share, expected, w in rows if expected is not None]
    weight = sum(w for *_, w in answered)

    def mean(values: list[float]) -> float:
        weighted = [v * w for v, (*_, w) in zip(values, answered, strict=True)]
        return sum(weighted) / weight if weight else math.nan

    return {
        "coverage": mean([float(e.low <= share <= e.high) for share, e, _ in answered]),
        "width": mean([e.high - e.low for _, e, _ in answered]),
        "error": mean([abs(e.share - share) for share, e, _ in answered]),
        "interval_score": mean([score_interval(share, e) for share, e, _ in answered]),
        "answered": weight / max(1, len(by_kind)),
    }


def score_interval(share: float, expected: Expectation) -> float:
    """Width of an interval, and 10 times the distance of a share outside it (Winkler's score)."""
    outside = max(expected.low - share, share - expected.high, 0.0)
    return expected.high - expected.low + outside / TAIL


def choose_kernel(calibration: Calibration) -> tuple[Calibration, dict[str, float]]:
    """The kernel with the best intervals on kinds that were left out.

    One that answers for less than two thirds of the kinds says too little.
    """
    tried = []
    for drift, spread in itertools.product(DRIFTS, SPREADS):
        candidate = replace(calibration, kernel=Kernel(drift, spread, TAIL, REACH))
        facts = summarise(candidate)
        if facts["answered"] >= 2 / 3:
            tried.append((candidate, facts))
    return min(tried, key=lambda row: row[1]["interval_score"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    pairs = collect_pairs(options.results)
    made = {
        "script": "bench/quality/calibrate.py",
        "commit": git("rev-parse", "--short", "HEAD"),
        "from": sorted(path.name for path in options.results.glob("quality*.json")),
    }
    empty = Calibration(made, Kernel(1, 1, TAIL, REACH), {}, METHODS, pairs)
    best, facts = choose_kernel(empty)
    print(f"{len(pairs)} pairs of {', '.join(best.worlds)}; kernel {asdict(best.kernel)}")
    print("on kinds that were left out, all kinds counting the same:")
    for method in METHODS:
        numbers = summarise(best, method)
        print(f"  {method:15}", ", ".join(f"{name} {x:.2f}" for name, x in numbers.items()))
    show_kinds(best)
    stored = {
        "made": made,
        "kernel": asdict(best.kernel),
        "checked": {name: round(value, 3) for name, value in facts.items()},
        "methods": METHODS,
        "pairs": pairs,
    }
    text = json.dumps(stored, separators=(",", ":")).replace('{"world"', '\n{"world"')
    options.out.write_text(text + "\n")
    print(f"wrote {options.out} ({len(text) / 1024:.0f} kB)")


def show_kinds(calibration: Calibration) -> None:
    """Prints what is expected of the copy on every kind, from all other kinds."""
    by_kind: dict[str, list] = defaultdict(list)
    for kind, share, expected in check_kinds(calibration):
        by_kind[kind].append((share, expected))
    for kind, several in by_kind.items():
        answered = [(share, e) for share, e in several if e is not None]
        measured = sum(share for share, _ in several) / len(several)
        line = f"  {kind:20} measured {measured:5.2f}"
        if answered:
            inside = sum(e.low <= share <= e.high for share, e in answered)
            low, high = min(e.low for _, e in answered), max(e.high for _, e in answered)
            mean = sum(e.share for _, e in answered) / len(answered)
            line += f", expected {mean:5.2f} [{low:.2f}, {high:.2f}]"
            line += f", {inside} of {len(answered)} inside"
        print(line + ("" if len(answered) == len(several) else ", no pair like this for the rest"))


if __name__ == "__main__":
    main()
