"""What giving up the damped `auto` changed, beside copies at the strengths that reports name."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from results import Mean, Row, Table, recovered
from tables import format_cell, format_table
from two_worlds import PRACTICE

TERRAIN = Path(__file__).parents[2] / "bench/results/terrain.json"
MOVES = {
    "forward": "terrain",
    "back": "terrain, back",
    "merged": "terrain, merged",
    "far": "terrain, far",
}
RELATED = ("near", "far", "pruned", "continued")


def read_terrain() -> Table:
    """The rows of terrain, in the form of the study's; a LoRA that learnt nothing has no share."""
    rows = json.loads(TERRAIN.read_text())["rows"]
    facts = [{key: row["losses"][key] for key in ("none", "oracle")} for row in rows]
    moved = [{"kind": MOVES[row["direction"]], "arch": ""} for row in rows]
    return Table([row | x | y for row, x, y in zip(rows, facts, moved, strict=True)])


def share_at(row: Row, strength: float) -> float | None:
    """What a copy recovers, interpolated linearly between the strengths that were measured."""
    tried = (label.removeprefix("copy @ ") for label in row["losses"] if label.startswith("copy @"))
    points = sorted((float(text), recovered(row, f"copy @ {text}")) for text in tried)
    shares = [share for _, share in points if share is not None]
    return float(np.interp(strength, [at for at, _ in points], shares)) if shares else None


def before_after_table(worlds: Mapping[str, Table]) -> str:
    """Kind by kind: the damped `auto`, and the copy that stands in its place."""
    ways: dict[str, Callable[[Row], float | None]] = {
        "before": lambda row: recovered(row, "auto"),
        "after: copy at 1": lambda row: share_at(row, 1.0),
        "0.8": lambda row: share_at(row, 0.8),
        "0.5": lambda row: share_at(row, 0.5),
    }
    lines = []
    for world, table in {**worlds, "terrain": read_terrain()}.items():
        present = {row["kind"] for row in table.rows} - {"independent"}  # refused, as before
        for kind in (k for k in dict.fromkeys([*PRACTICE, *MOVES.values()]) if k in present):
            part = table.where(kind=kind)
            means: dict[str, Mean | None] = {name: part.mean(way) for name, way in ways.items()}
            before, after = means["before"], means["after: copy at 1"]
            if before and after:
                change = f"{after[0] - before[0]:+.2f}".replace("-0.00", "+0.00")
                lines.append([kind, world, *map(format_cell, means.values()), change])
    return format_table(["target", "world", *ways, "after − before"], lines)


def samples_table(table: Table) -> str:
    """What samples of the digits show: the distance of a style, and how often a concept is seen."""
    ways = ("none", "auto", "copy", "prolora 0.9", "oracle")
    scores = {
        "distance of the style": ("mmd", ("thick", "slanted")),
        "concept seen": ("concept", ("concept",)),
    }
    lines = []
    for told, (score, adapters) in scores.items():

        def read(row: Row, way: str, score: str = score) -> float | None:
            return (row["samples"] or {}).get(way, {}).get(score)

        for kind in RELATED:
            part = table.where(kind=kind, adapter=adapters)
            cells = [format_cell(part.mean(functools.partial(read, way=way))) for way in ways]
            lines.append([kind, told, *cells])
    head = ["no LoRA", "before", "after: copy at 1", "`prolora`", "trained on the target"]
    return format_table(["target", "", *head], lines)
