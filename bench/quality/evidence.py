"""Tables and figure of docs/evidence.md: ``python bench/quality/evidence.py [--work DIR]``.

With --work the scores there are collected into bench/results/quality.json first. The tables are
written between the marks of the pages; the figure contains the numbers that it shows.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from results import (
    COPIES,
    Mean,
    Row,
    Table,
    best,
    collect,
    fill_page,
    format_cell,
    format_table,
    read_terrain,
    recovered,
    save_figure,
)
from worlds import NAMES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/evidence.md"
RELATED = ("near", "far", "pruned", "continued")
KINDS = (*RELATED, "independent")


def results_of(world: str) -> Path:
    """The file of a world's scores."""
    name = "quality" if world == NAMES[0] else f"quality_{world}"
    return ROOT / f"bench/results/{name}.json"


def read_results(world: str) -> Table:
    """Every scored row of a world."""
    return Table(json.loads(results_of(world).read_text())["rows"])


def methods_table(table: Table) -> str:
    shown = {"copy": "copy @ 1", "copy at 0.6": "copy @ 0.6"}
    shown["`prolora`, energy 0.99"] = "prolora 0.99 @ 1"
    rows = [
        [name, *(format_cell(table.where(kind=k).share(label)) for k in KINDS)]
        for name, label in shown.items()
    ]
    return format_table(["", *KINDS], rows)


PRACTICE = (
    "near",
    "continued",
    "merged 1",
    "merged 3",
    "merged 10",
    "blended",
    "few-step",
    "guided",
    "pruned",
    "deepened",
    "sibling",
    "far",
    "far, long",
    "far ground",
    "independent",
    "resized",
)
"""Kinds of target, in the order of the tables."""

BASELINES = {
    "copy": "copy @ 1",
    "norm": "norm-matched @ 1",
    "extracted": "extracted @ 1",
    "CASA": "casa @ 1",
    "`lora-x`": "lora-x 0.9 @ 1",
    "`prolora`": "prolora 0.99 @ 1",
    "`blocks`": "blocks 0.9 @ 1",
}


def order_kinds(table: Table) -> list[str]:
    """The kinds of a table in the order of PRACTICE."""
    kinds = {row["kind"] for row in table.rows}
    return [kind for kind in PRACTICE if kind in kinds]


def baselines_table(table: Table) -> str:
    """Every baseline on every kind, means alone."""
    lines = []
    for kind in order_kinds(table):
        part = table.where(kind=kind)
        if not part.share("copy @ 1"):
            continue
        labels = [*BASELINES.values(), best(part, COPIES)]
        means = [part.share(label) for label in labels]
        lines.append([kind, *("–" if mean is None else f"{mean[0]:.2f}" for mean in means)])
    return format_table(["", *BASELINES, "best copy"], lines)


MOVES = {
    "forward": "terrain",
    "back": "terrain, back",
    "merged": "terrain, merged",
    "far": "terrain, far",
}


def share_at(row: Row, strength: float) -> float | None:
    """What a copy recovers, interpolated linearly between the strengths that were measured."""
    tried = (label.removeprefix("copy @ ") for label in row["losses"] if label.startswith("copy @"))
    points = sorted((float(text), recovered(row, f"copy @ {text}")) for text in tried)
    shares = [share for _, share in points if share is not None]
    return float(np.interp(strength, [at for at, _ in points], shares)) if shares else None


STRENGTHS = (1.0, 0.8, 0.5)


def measure_strengths(
    worlds: Mapping[str, Table],
) -> list[tuple[str, str, dict[float, Mean | None]]]:
    """(kind, world, strength -> what a copy gives), for the strengths that reports name."""
    rows = []
    terrain = Table([row | {"kind": MOVES[row["kind"]]} for row in read_terrain()])
    for world, table in {**worlds, "terrain": terrain}.items():
        present = {row["kind"] for row in table.rows} - {"independent"}  # refused
        for kind in (k for k in dict.fromkeys([*PRACTICE, *MOVES.values()]) if k in present):
            part = table.where(kind=kind)
            ways = {at: functools.partial(share_at, strength=at) for at in STRENGTHS}
            means = {at: part.mean(way) for at, way in ways.items()}
            if means[1.0]:
                rows.append((kind, world, means))
    return rows


def strengths_table(worlds: Mapping[str, Table]) -> str:
    """Kind by kind, what a copy gives at the strengths that reports name."""
    rows = measure_strengths(worlds)
    lines = [[kind, world, *map(format_cell, means.values())] for kind, world, means in rows]
    return format_table(["target", "world", *(f"{at:g}" for at in STRENGTHS)], lines)


FIGURE = ROOT / "docs/images/shares.svg"


def list_shares(worlds: Mapping[str, Table]) -> list[list[object]]:
    """[target, strength, mean, low, high] of every point of the figure."""
    points: list[list[object]] = []
    for kind, world, means in measure_strengths(worlds):
        for at in (1.0, 0.5):
            if (mean := means[at]) is not None:
                points.append([f"{kind} ({world})", at, *(round(float(x), 4) for x in mean)])
    return points


def draw_shares(points: list[list[object]], axes: Any) -> None:
    """Draws the share by target with its interval, of a copy at 1 and at 0.5."""
    targets = list(dict.fromkeys(point[0] for point in points))
    for strength, colour, shift in ((1.0, "#1f6feb", 0.0), (0.5, "#bf8700", 0.3)):
        drawn = [point for point in points if point[1] == strength]
        rows = [targets.index(point[0]) + shift for point in drawn]
        mean, low, high = np.array([point[2:] for point in drawn], dtype=float).T
        error, label = [mean - low, high - mean], f"copy at {strength:g}"
        axes.errorbar(mean, rows, xerr=error, fmt="o", color=colour, ms=4, lw=1.2, label=label)
    for share, style in ((0, "-"), (1, ":")):
        axes.axvline(share, color="grey", lw=0.8, ls=style)
    axes.set_yticks(range(len(targets)), targets)
    axes.invert_yaxis()
    axes.set_xlabel("share of what training on the target gives (1: as good; below 0: harm)")
    axes.legend(loc="upper left", frameon=False)


def samples_table(table: Table) -> str:
    """How often samples of the digits show a concept."""
    ways = ("none", "copy", "prolora 0.9", "oracle")
    lines = []
    for kind in RELATED:
        part = table.where(kind=kind, adapter="concept")
        means = [part.mean(functools.partial(_see_concept, way=way)) for way in ways]
        lines.append([kind, *map(format_cell, means)])
    head = ["no LoRA", "copy", "`prolora`, energy 0.9", "trained on the target"]
    return format_table(["target", *head], lines)


def _see_concept(row: Row, way: str) -> float | None:
    return (row["samples"] or {}).get(way, {}).get("concept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default=NAMES[0])
    parser.add_argument("--work", type=Path, help="the study's folder")
    options = parser.parse_args()
    if options.work:
        results = results_of(options.world)
        kept = json.loads(results.read_text()) if results.exists() else {}
        results.write_text(json.dumps(collect(options.work, kept), indent=0) + "\n")
    worlds = {name: read_results(name) for name in NAMES if results_of(name).exists()}
    everything = worlds[NAMES[0]]
    tables: dict[str, str] = {
        "methods": methods_table(everything),
        "strengths": strengths_table(worlds),
        "samples": samples_table(everything),
        "baselines": baselines_table(worlds["icons"]),
    }
    PAGE.write_text(fill_page(PAGE.read_text(), tables))
    points = list_shares(worlds)
    height = 0.24 * len({point[0] for point in points}) + 0.8
    save_figure(FIGURE, points, height, draw_shares)


if __name__ == "__main__":
    main()
