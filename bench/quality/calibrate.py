"""What a copy at strength 1 gave, class by class: ``python bench/quality/calibrate.py``.

It reads the stored rows of both worlds, of the students and of terrain, and prints the shares that
`prolora.comparison.expectation.CLASSES` may hold. Losses alone count, and a kind of target counts
the same however many LoRAs were scored on it. Each world is left out once, and a range of the
others is asked how many of its shares it holds: a class where that fails has no number.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from results import recovered

from prolora.comparison.expectation import CLASSES, classify
from prolora.core.verdict import PairVerdict

RESULTS = Path(__file__).parents[2] / "bench" / "results"
WORLDS = {
    "digits": "quality",
    "icons": "quality_icons",
    "students": "students",
    "terrain": "terrain",
}
STUDENTS = "digits"
"""The world whose models the students were made of: they are left out with it."""
PRUNED = ("pruned", "renumbered")
"""Kinds of target that lack blocks of the source."""
FEW_STEP = ("few-step", "consistency", "matching")
"""How kinds of target begin that draw in few steps."""
WORDS = {"should work": (0.7, math.inf), "in part": (0.3, 0.95), "do not expect": (-math.inf, 0.3)}
"""Words of a headline -> the shares of training on the target of which they are right."""
TAIL = 0.1
LEAST_HELD, LEAST_RIGHT, WIDEST = 0.8, 0.6, 0.4
"""A range is printed where it held such a share, the word was right in such, and it is narrow."""


class Score(NamedTuple):
    """One LoRA, copied at strength 1."""

    world: str
    kind: str  # of target, with the file of its world
    share: float  # of what training on the target gives


class Trial(NamedTuple):
    """A class of pairs, with each world left out once."""

    held: float  # the share of left-out LoRAs in the range of the other worlds; NaN with one world
    right: float  # the share of LoRAs for which the headline's word is right; NaN without a word
    worlds: dict[str, float]  # world -> `held` of it alone


def read_rows() -> list[tuple[str, str, dict[str, Any], PairVerdict]]:
    """World, kind of target, scored row and verdict, of every LoRA that was scored on a target.

    The LoRAs of UNets were not measured; they count as large as the transformer's of that name.
    """
    stored = {w: json.loads((RESULTS / f"{f}.json").read_text()) for w, f in WORLDS.items()}
    sizes = {world: results.get("sizes", {}) for world, results in stored.items()}
    sizes["students"] = sizes[STUDENTS]
    found = []
    for world, results in stored.items():
        for row in results["rows"]:
            if not (facts := row.get("verdict")):
                continue
            kind, size = row.get("kind") or row["direction"], facts.get("size")
            size = sizes[world].get(row["adapter"], size)
            verdict = PairVerdict(facts["drift"], facts["cosine"], size)
            row |= {end: row["losses"][end] for end in ("none", "oracle") if end not in row}
            found.append((world, f"{kind} {row.get('arch', '')}", row, verdict))
    return found


def collect_scores() -> dict[str, list[Score]]:
    """Class -> every LoRA that falls into it."""
    found: dict[str, list[Score]] = defaultdict(list)
    for world, kind, row, verdict in read_rows():
        share = recovered(row, "copy @ 1")
        if share is not None and math.isfinite(share):
            group = classify(verdict, kind.startswith(PRUNED), kind.startswith(FEW_STEP))
            whole = STUDENTS if world == "students" else world
            found[group].append(Score(whole, f"{world} {kind}", share))
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


def weigh_kinds(scores: Sequence[Score]) -> list[float]:
    """A weight for every LoRA: kinds of target count the same."""
    counts: dict[str, int] = defaultdict(int)
    for score in scores:
        counts[score.kind] += 1
    return [1 / counts[score.kind] for score in scores]


def average(values: Sequence[float], scores: Sequence[Score]) -> float:
    """The mean of a value for each LoRA, over kinds."""
    weights = weigh_kinds(scores)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)


def summarise(scores: Sequence[Score]) -> tuple[float, float, float]:
    """Low, mean and high of a class: a tenth of the LoRAs did worse, and a tenth did better."""
    weights, values = weigh_kinds(scores), [score.share for score in scores]
    low, high = (find_quantile(values, weights, level) for level in (TAIL, 1 - TAIL))
    return round(low, 2), round(average(values, scores), 2), round(high, 2)


def leave_worlds_out(scores: Sequence[Score], headline: str) -> Trial:
    """Asks the range of the other worlds, and the headline's word, of each world."""
    worlds = dict.fromkeys(score.world for score in scores)
    held: dict[Score, bool] = {}
    for world in worlds if len(worlds) > 1 else ():
        low, _, high = summarise([score for score in scores if score.world != world])
        held |= {x: low <= x.share <= high for x in scores if x.world == world}
    word = next((w for w in ("in part", *WORDS) if w in headline.lower()), None)
    low, high = WORDS.get(word or "", (math.nan, math.nan))
    right = average([low <= score.share < high for score in scores], scores)
    alone = {
        world: average([held[x] for x in part], part)
        for world in worlds
        if held and (part := [x for x in scores if x.world == world])
    }
    every = average([held[x] for x in scores], scores) if held else math.nan
    return Trial(every, right if word else math.nan, alone)


def choose_range(scores: Sequence[Score], headline: str) -> tuple[float, float] | None:
    """The range that a class may print; None where leaving worlds out speaks against it."""
    trial, (low, _, high) = leave_worlds_out(scores, headline), summarise(scores)
    kept = trial.held >= LEAST_HELD and trial.right >= LEAST_RIGHT and high - low < WIDEST
    return (low, high) if kept else None


def rank_numbers(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values get the mean of their ranks."""
    order = sorted(values)
    return [order.index(x) + (order.count(x) + 1) / 2 for x in values]


def correlate_ranks(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN if either has one value only."""
    a, b = rank_numbers(x), rank_numbers(y)
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return statistics.correlation(a, b)


def collect_changed() -> dict[str, list[tuple[dict[str, float], float]]]:
    """World -> statistics of the weights, and the share that a copy gave, in the class *changed*.

    One entry for each target: the mean over its LoRAs. *spread* is the effective rank of the drift
    relative to noise's. prolora does not compute it any more: rows scored since are left out.
    """
    targets: dict[tuple[str, str], list[tuple[dict[str, float], float]]] = defaultdict(list)
    for world, kind, row, verdict in read_rows():
        share = recovered(row, "copy @ 1")
        group = classify(verdict, kind.startswith(PRUNED), kind.startswith(FEW_STEP))
        spread = row["verdict"].get("spread")
        if group != "changed" or not verdict.size or spread is None:
            continue
        if share is not None and math.isfinite(share):
            facts = {"drift/size": verdict.drift / verdict.size, "spread": float(spread)}
            targets[world, kind].append((facts, share))
    found: dict[str, list[tuple[dict[str, float], float]]] = defaultdict(list)
    for (world, _), rows in targets.items():
        means = {name: statistics.fmean(facts[name] for facts, _ in rows) for name in rows[0][0]}
        found[world].append((means, statistics.fmean(share for _, share in rows)))
    return found


def main() -> None:
    print("| class | kinds, LoRAs | share | word right | range holds | world by world | printed |")
    print("|---|---|---|---|---|---|---|")
    for group, scores in collect_scores().items():
        headline = CLASSES[group].headline
        trial, (low, mean, high) = leave_worlds_out(scores, headline), summarise(scores)
        kinds = len({score.kind for score in scores})
        each = ", ".join(f"{world} {held:.2f}" for world, held in trial.worlds.items())
        cells = [group, f"{kinds}, {len(scores)}", f"{mean} ({low} to {high})"]
        cells += ["–" if math.isnan(x) else f"{x:.2f}" for x in (trial.right, trial.held)]
        cells += [each or "–", "yes" if choose_range(scores, headline) else "no"]
        print(f"| {' | '.join(cells)} |")
    print()
    print("| changed: rank correlation with the share | targets | drift/size | spread |")
    print("|---|---|---|---|")
    for world, rows in collect_changed().items():
        shares = [share for _, share in rows]
        cells = [
            f"{correlate_ranks([facts[name] for facts, _ in rows], shares):.2f}"
            for name in ("drift/size", "spread")
        ]
        print(f"| {world} | {len(rows)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
