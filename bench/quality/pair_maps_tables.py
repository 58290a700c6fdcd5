"""The tables of docs/fit_measured.md on maps between two models, beside fits of the same LoRAs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from crossed import COARSE, PIXELS
from crossed import PAIRS as CROSSED
from evidence import ROOT
from pair_maps_fitting import BEST, CROSSING
from results import Row
from tables import format_table

from prolora.probe.settings import FitSettings
from prolora.probe.workload import Workload

WORD = ", asked with the concept's word"
"""What a way is called where the prompts had the word that no base has learnt."""


def adapters_of(kind: str) -> tuple[str, ...]:
    """The four LoRAs of a pair."""
    return ("neon", "duotone", "concept", "shaded" if kind == CROSSING else "fewstep")


def tables_of(results: dict[str, Any]) -> dict[str, str]:
    """Mark on the page -> table."""
    fits = stored_fits()
    return {
        "maps ways": ways_table(results["rows"], fits),
        "maps pairs": pairs_table(results["rows"], fits),
        "maps cost": cost_table(results, fits),
        "maps start": start_table(results["rows"]),
    }


def stored_fits() -> dict[tuple[str, int, str], Row]:
    """Pair, seed and LoRA -> the fit from nothing, at the strength that is written."""
    files = ROOT / "bench/results/probing_icons.json", ROOT / "bench/results/crossing.json"
    icons, crossed = (json.loads(path.read_text())["rows"] for path in files)
    found = {
        (row["kind"], row["seed"], row["adapter"]): row
        for row in icons
        if row["name"] == "study" and row["method"] == "probe"
    }
    for row in crossed:
        if row["pair"] == next(n for n, p in CROSSED.items() if p == (PIXELS, COARSE)):
            if row["method"] == "probe":
                found[CROSSING, row["seed"], row["adapter"]] = row
    return found


def ways_table(rows: list[Row], fits: dict[tuple[str, int, str], Row]) -> str:
    """Every way on the first pair: the score at the strength that was chosen."""
    rows = [row for row in rows if (row["kind"], row["seed"]) == ("independent", 1)]
    names = adapters_of("independent")
    lines = []
    ways = dict.fromkeys(row["way"] for row in rows if "score" in row)
    for way in sorted(ways, key=lambda way: WORD in way):
        part = {row["adapter"]: row["score"] for row in rows if row["way"] == way}
        cells = [f"{part[n]:.2f}" if n in part else "–" for n in names]
        lines.append(
            [way, *cells, f"{mean(part.values()):.2f}" if len(part) == len(names) else "–"]
        )
    fitted = [fits["independent", 1, name]["score"] for name in names]
    lines.append(["*the fit*", *(f"{s:.2f}" for s in fitted), f"{mean(fitted):.2f}"])
    return format_table(["way", *names, "mean"], lines)


def pairs_table(rows: list[Row], fits: dict[tuple[str, int, str], Row]) -> str:
    """The best way on every pair, LoRA by LoRA."""
    lines = []
    for pair in dict.fromkeys((row["kind"], row["seed"]) for row in rows):
        sums = []
        for name in adapters_of(pair[0]):
            part = [r for r in rows if (r["kind"], r["seed"], r["adapter"]) == (*pair, name)]
            copied, moved, parts = (
                next((r for r in part if r["way"] == way), None)
                for way in ("copy", BEST, f"{BEST}; parts")
            )
            if moved is None or parts is None:
                continue
            fitted = fits[(*pair, name)]["score"]
            fixed = moved["scores"]["1"], moved["scores"]["1.5"]
            sums.append((moved["score"], parts["score"], *fixed, fitted))
            lines.append(
                [
                    f"{pair[0]}, seed {pair[1]}",
                    name,
                    f"{copied['scores']['1']:.2f}" if copied else "–",
                    f"{moved['score']:.2f} at {moved['strength']:g}",
                    f"{parts['score']:.2f}",
                    f"{moved['scores']['1']:.2f}",
                    f"{moved['scores']['1.5']:.2f}",
                    f"{fitted:.2f}",
                ]
            )
        if sums:
            means = [mean(part) for part in zip(*sums, strict=True)]
            shares = [f"**{m:.2f}** ({m / means[-1]:.0%})" for m in means[:-1]]
            lines.append([lines[-1][0], "*mean*", "", *shares, f"**{means[-1]:.2f}**"])
    head = ["pair", "LoRA", "copy", "at the chosen strength", "every part at its own", "at 1"]
    return format_table([*head, "at 1.5", "the fit"], lines)


def cost_table(results: dict[str, Any], fits: dict[tuple[str, int, str], Row]) -> str:
    """What is done once for a pair, for every LoRA, and for a fit."""
    lines = []
    asked = sum(map(sum, Workload(FitSettings(), 25).predictions.values()))
    for about in results["pairs"]:
        if about.get("concept"):
            continue
        pair = about["kind"], about["seed"]
        rows = [r for r in results["rows"] if (r["kind"], r["seed"]) == pair]
        seconds = about["seconds"]
        once = seconds["sample"] + seconds["collect"] + seconds[BEST]
        moved = [r for r in rows if r["way"] == BEST]
        parts = [r for r in rows if r["way"] == f"{BEST}; parts"]
        fitted = [sum(fits[(*pair, r["adapter"])]["seconds"].values()) for r in moved]
        move = mean(r["seconds"]["move"] for r in moved)
        choose = mean(r["seconds"]["choose"] for r in moved)
        weigh = mean(r["seconds"]["choose"] for r in parts)
        lines.append(
            [
                f"{pair[0]}, seed {pair[1]}",
                f"{once:.0f} s, {about['predictions']}",
                f"{1000 * move:.0f} ms, 0",
                f"{choose:.1f} s, {moved[0]['predictions']}",
                f"{weigh:.1f} s, {parts[0]['predictions']}",
                f"{mean(fitted):.0f} s, about {asked}"
                if pair[0] != CROSSING
                else f"{mean(fitted):.0f} s",
            ]
        )
    head = ["pair", "maps, once", "moving a LoRA", "a strength", "of every part", "a fit"]
    return format_table(head, lines)


def start_table(rows: list[Row]) -> str:
    """Short fits from what was moved and from nothing, at strength 1 and 1.25."""
    lines = []
    fitted = [row for row in rows if row["way"] == "fit"]
    for key in dict.fromkeys(
        (r["kind"], r["adapter"], r["images"], r["fit_steps"]) for r in fitted
    ):
        part = {
            r["start"]: r
            for r in fitted
            if (r["kind"], r["adapter"], r["images"], r["fit_steps"]) == key
        }
        cells = [
            f"{r['scores']['1']:.2f}, {r['scores']['1.25']:.2f} ({r['predictions']})"
            for r in (part["nothing"], part["moved"])
        ]
        lines.append([*map(str, key), *cells])
    head = ["pair", "LoRA", "images", "steps", "from nothing", "from the moved LoRA"]
    return format_table(head, lines)


def mean(values: Iterable[float]) -> float:
    """Of some numbers."""
    some = list(values)
    return sum(some) / len(some)
