"""Fills the tables of README.md from terrain.json: ``python bench/real/terrain_tables.py``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "quality"))

# isort: split
from results import MIN_GAP, Row, Table, fill_page, format_cell, format_table, read_terrain

HERE = Path(__file__).parent
METHODS = (
    "none",
    "copy @ 1",
    "best fixed copy",
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
DIRECTIONS = {"forward": "0.4.1 → 0.4.2", "back": "0.4.2 → 0.4.1"}


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
            cells.append(format_cell(Table(part).mean(lambda row: row["shares"].get(label))))  # noqa: B023
            if method == "best fixed copy":
                cells[-1] += f" @ {label.removeprefix('copy @ ')}"
        label = "copy @ 1" if method == "best fixed copy" else method
        on_fits = Table(same).mean(lambda row: row["shares"].get(label))  # noqa: B023
        cells.append("" if method == "best fixed copy" else format_cell(on_fits))
        lines.append(cells)
    counts = [f"{title}, {len(parts[name])} LoRAs" for name, title in DIRECTIONS.items()]
    return format_table(["method", *counts, f"the {len(same)} that were fitted"], lines)


def adapters_table(rows: list[Row]) -> str:
    """A line for each kind of LoRA, with the rows of one seed and the ideas that all kinds have."""
    kinds = list(dict.fromkeys(row["layers"] for row in rows))
    ideas = [{row["idea"] for row in rows if row["layers"] == kind} for kind in kinds]
    rows = [row for row in rows if row["seed"] == 0 and row["idea"] in set.intersection(*ideas)]
    methods = ("copy @ 1", "prolora 0.9", "lora-x 0.9", "casa", "delta sampling")
    lines = []
    for kind in kinds:
        part = [row for row in rows if row["layers"] == kind]
        cells = (Table(part).mean(lambda row: row["shares"][method]) for method in methods)  # noqa: B023
        best = best_fixed(part)
        lines.append([kind, str(len(part)), *map(format_cell, cells), mean_share(part, best)])
    return format_table(["LoRA", "n", *methods, "best fixed copy"], lines)


def ideas_table(rows: list[Row]) -> str:
    """A line for each kind of LoRA: losses in the mean over seeds and directions."""
    methods = ("copy @ 1", "prolora 0.9", "delta sampling", "oracle")
    lines = []
    for key in dict.fromkeys((row["layers"], row["idea"]) for row in rows):
        part = [row for row in rows if (row["layers"], row["idea"]) == key]
        cells = [sum(row["losses"][name] for row in part) / len(part) for name in methods]
        counted = "yes" if all(is_learnt(row) for row in part) else "no"
        lines.append([" ".join(key), str(len(part)), *(f"{c:.2f}" for c in cells), counted])
    return format_table(["LoRA", "n", *methods, "counts"], lines)


def is_learnt(row: Row) -> bool:
    """Whether the LoRA that was trained on the target takes away enough to set a scale."""
    return 1 - row["losses"]["oracle"] >= MIN_GAP


def samples_table(rows: list[Row]) -> str:
    """Distances of samples from the target's own with the idea done to them."""
    methods = ("none", "copy @ 1", "prolora 0.9", "fit", "delta sampling", "oracle")
    statistics = ("log slopes", "heights", "log spectrum")
    lines = []
    for method in methods:
        part = [row for row in rows if method in row["samples"]]
        if part:
            cells = [
                format_cell(Table(part).mean(lambda row: row["samples"][method][name]))  # noqa: B023
                for name in statistics
            ]
            lines.append([method, str(len(part)), *cells])
    return format_table(["row", "n", *statistics], lines)


def mean_share(rows: list[Row], label: str) -> str:
    """The mean, and at which strength."""
    at = label.split(" ")[-1]
    mean = f"{sum(row['shares'][label] for row in rows) / len(rows):.2f}"
    return f"{mean} @ {at}" if label.startswith("copy") and at != "1" else mean


def main() -> None:
    rows = [row for row in read_terrain() if "shares" in row]
    learnt = [row for row in rows if is_learnt(row)]
    real = [row for row in learnt if row["direction"] in DIRECTIONS]
    usual = [row for row in real if row["layers"] == "lora-16"]
    page = HERE / "README.md"
    tables = {
        "terrain shares": shares_table(usual),
        "terrain adapters": adapters_table(real),
        "terrain ideas": ideas_table([row for row in rows if row["direction"] in DIRECTIONS]),
        "terrain samples": samples_table(usual),
    }
    page.write_text(fill_page(page.read_text(), tables))


if __name__ == "__main__":
    main()
