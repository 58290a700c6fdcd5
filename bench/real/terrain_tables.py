"""Fills the tables of README.md from terrain.json: ``python bench/real/terrain_tables.py``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "quality"))

# isort: split
from evidence import fill_page
from intervals import interval
from results import MIN_GAP, Mean
from tables import format_cell, format_table

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "terrain.json"
Row = dict[str, Any]
METHODS = (
    "none",
    "copy @ 1",
    "best fixed copy",
    "auto",
    "prolora 0.9",
    "lora-x 0.9",
    "blocks 0.9",
    "casa",
    "casa, arbitration alone",
    "extracted",
    "fit",
    "fit, fitted",
    "adamw, fitted",
    "delta sampling",
    "oracle",
)
FITTED = ("fit", "fit, fitted", "adamw, fitted")
DIRECTIONS = {"forward": "0.4.1 → 0.4.2", "back": "0.4.2 → 0.4.1"}


def mean_of(rows: list[Row], value: Callable[[Row], float | None]) -> Mean | None:
    """With a 95 % interval over seeds and LoRAs."""
    values = {
        ((row["direction"], row["seed"]), (row["idea"], row["adapter"])): value(row) for row in rows
    }
    known = {key: number for key, number in values.items() if number is not None}
    return interval(known) if known else None


def best_fixed(rows: list[Row]) -> str:
    """The copy whose strength is best in the mean over some rows."""
    names = [name for name in rows[0]["shares"] if name.startswith("copy")]
    return max(names, key=lambda name: sum(row["shares"][name] for row in rows))


def shares_table(rows: list[Row]) -> str:
    """A line for each method."""
    lines = []
    parts = {name: [r for r in rows if r["direction"] == name] for name in DIRECTIONS}
    best = {name: best_fixed(part) for name, part in parts.items() if part}
    same = [row for row in rows if "fit" in row]
    for method in METHODS:
        cells = [method]
        for name, part in parts.items():
            label = best.get(name, "") if method == "best fixed copy" else method
            cells.append(format_cell(mean_of(part, lambda row: row["shares"].get(label))))  # noqa: B023
            if method == "best fixed copy":
                cells[-1] += f" @ {label.removeprefix('copy @ ')}"
        label = "copy @ 1" if method == "best fixed copy" else method
        on_fits = mean_of(same, lambda row: row["shares"].get(label))  # noqa: B023
        cells.append("" if method == "best fixed copy" else format_cell(on_fits))
        lines.append(cells)
    counts = [f"{title}, {len(parts[name])} LoRAs" for name, title in DIRECTIONS.items()]
    return format_table(["method", *counts, f"the {len(same)} that were fitted"], lines)


def ideas_table(rows: list[Row]) -> str:
    """A line for each kind of LoRA: losses in the mean over seeds and directions."""
    methods = ("copy @ 1", "prolora 0.9", "delta sampling", "oracle")
    lines = []
    for key in dict.fromkeys((row["adapter"], row["idea"]) for row in rows):
        part = [row for row in rows if (row["adapter"], row["idea"]) == key]
        cells = [sum(row["losses"][name] for row in part) / len(part) for name in methods]
        counted = "yes" if all(is_learnt(row) for row in part) else "no"
        lines.append([" ".join(key), str(len(part)), *(f"{c:.2f}" for c in cells), counted])
    return format_table(["LoRA", "n", *methods, "counts"], lines)


def is_learnt(row: Row) -> bool:
    """Whether the LoRA that was trained on the target takes away enough to set a scale."""
    return 1 - row["losses"]["oracle"] >= MIN_GAP


def samples_table(rows: list[Row]) -> str:
    """Distances of samples from the target's own with the idea done to them."""
    methods = ("none", "copy @ 1", "auto", "prolora 0.9", "fit", "delta sampling", "oracle")
    statistics = ("log slopes", "heights", "log spectrum")
    lines = []
    for method in methods:
        part = [row for row in rows if method in row["samples"]]
        if part:
            cells = [
                format_cell(mean_of(part, lambda row: row["samples"][method][name]))  # noqa: B023
                for name in statistics
            ]
            lines.append([method, str(len(part)), *cells])
    return format_table(["row", "n", *statistics], lines)


def main() -> None:
    rows = [row for row in json.loads(RESULTS.read_text())["rows"] if "shares" in row]
    learnt = [row for row in rows if is_learnt(row)]
    page = HERE / "README.md"
    tables = {
        "terrain shares": shares_table(learnt),
        "terrain ideas": ideas_table(rows),
        "terrain samples": samples_table(learnt),
    }
    page.write_text(fill_page(page.read_text(), tables))


if __name__ == "__main__":
    main()
