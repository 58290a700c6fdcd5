"""The study's scores as one file, and as numbers to put in tables.

`collect` reads what `study.py` left in its folder; the rest reads the collected JSON, which is what
the repository keeps.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
Mean = tuple[float, float, float]
MIN_GAP = 0.08
"""The least share of the loss that an oracle must take away for a row to count."""
KEYS = ("arch", "kind", "seed", "adapter")
"""What tells a row from all others."""
COPIES = tuple(f"copy @ {s:g}" for s in (0.25, 0.4, 0.6, 0.8, 1.0, 1.25))


def collect(work: Path, kept: dict[str, Any]) -> dict[str, Any]:
    """Everything that was scored: a row for each target and adapter, and how it was made.

    Rows that were collected earlier stay where they were not scored again; parts of them that the
    folder lacks (samples) are not kept beside new losses.
    """
    rows = [dict(row) for row in kept.get("rows", [])]
    for path in sorted(work.glob("*/*-losses.json")):
        kind, seed = path.name.removesuffix("-losses.json").rsplit("-", 1)
        parts = {
            part: _read(path.with_name(f"{kind}-{seed}-{part}.json"))
            for part in ("losses", "samples")
        }
        for adapter, losses in parts["losses"].items():
            row = {"arch": path.parent.name, "kind": kind, "seed": int(seed), "adapter": adapter}
            rows.append(round_numbers(row | losses | {"samples": parts["samples"].get(adapter)}))
    rows = list({tuple(row[key] for key in KEYS): row for row in rows}.values())
    made = {
        "script": "bench/quality/study.py",
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": git("log", "-1", "--format=%cs"),
        "torch": torch.__version__,
        "seeds": sorted({row["seed"] for row in rows}),
    }
    made |= {"before": kept["made"]} if kept else {}
    sizes = {"sizes": kept["sizes"]} if "sizes" in kept else {}
    return {"made": made, **sizes, "rows": rows}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def git(*words: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()


class RowsFile:
    """Rows by key in a JSON file, which is written after each; what it has is not made again."""

    def __init__(self, path: Path, made: str = "") -> None:
        self.path = path
        table = json.loads(path.read_text()) if path.exists() else {}
        self.table = {"made": {}, "rows": {}} | table
        self.rows: dict[str, Any] = self.table["rows"]
        facts = {
            "command": " ".join(["python", *sys.argv]),
            "commit": git("rev-parse", "--short", "HEAD"),
            "date": str(datetime.date.today()),
            "torch": torch.__version__,
        }
        self.table["made"] |= {made: facts} if made else facts

    def add(self, key: str, row: Any) -> None:
        """Prints and writes a row."""
        self.rows[key] = row
        print(key, row, flush=True)
        self.path.write_text(json.dumps(self.table, indent=1) + "\n")


def round_numbers(value: Any) -> Any:
    """Five digits are more than the intervals bear."""
    if isinstance(value, dict):
        return {key: round_numbers(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def recovered(row: Row, label: str) -> float | None:
    """Share of the held-out gap that a method recovers; None where it was not run.

    Also None where the oracle gains next to nothing: a share of that is noise.
    """
    loss, gap = row["losses"].get(label), row["none"] - row["oracle"]
    return None if loss is None or gap < MIN_GAP * row["none"] else (row["none"] - loss) / gap


RESAMPLES = 4000


def interval(values: Mapping[tuple, float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of values by (seed, adapter).

    Targets and adapters are both draws from something larger, and the adapters of one target share
    its luck. So seeds and adapters are resampled independently, each with replacement, and the
    mean is taken over their product (the two-way bootstrap of a crossed design).
    """
    seeds = sorted({seed for seed, _ in values}, key=str)
    adapters = sorted({adapter for _, adapter in values})
    table = np.array([[values.get((s, a), np.nan) for a in adapters] for s in seeds])
    generator = np.random.default_rng(0)
    rows = generator.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    columns = generator.integers(len(adapters), size=(RESAMPLES, len(adapters)))
    means = np.nanmean(table[rows[:, :, None], columns[:, None, :]], axis=(1, 2))
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(np.nanmean(table)), float(low), float(high)


@dataclass(frozen=True)
class Table:
    """Rows of one or more kinds of target, and means over them."""

    rows: list[Row]

    def where(self, **wanted: Any) -> Table:
        """The rows whose fields have these values, or one of several values in a tuple."""

        def fits(row: Row) -> bool:
            return all(
                row[key] in value if isinstance(value, tuple) else row[key] == value
                for key, value in wanted.items()
            )

        return Table([row for row in self.rows if fits(row)])

    def mean(self, value: Callable[[Row], float | None]) -> Mean | None:
        """Mean and 95 % interval over targets and adapters; None where nothing was scored."""
        values = {
            ((row["arch"], row["kind"], row["seed"]), row["adapter"]): got
            for row in self.rows
            if (got := value(row)) is not None and not np.isnan(got)
        }
        return interval(values) if values else None

    def share(self, label: str) -> Mean | None:
        """The mean share that a method recovers."""
        return self.mean(lambda row: recovered(row, label))


TERRAIN = Path(__file__).parents[1] / "results/terrain.json"


def read_terrain() -> list[Row]:
    """The rows of terrain, in the form of the study's: each idea and kind of LoRA is an adapter."""
    return [
        row
        | {key: row["losses"][key] for key in ("none", "oracle")}
        | {"arch": "", "kind": row["direction"], "layers": row["adapter"]}
        | {"adapter": f"{row['idea']}, {row['adapter']}"}
        for row in json.loads(TERRAIN.read_text())["rows"]
    ]


def best(table: Table, labels: Iterable[str]) -> str:
    """The label with the highest mean share; the first of them where nothing was run."""
    labels = list(labels)
    means = {label: mean[0] for label in labels if (mean := table.share(label))}
    return max(means, key=lambda label: means[label]) if means else labels[0]


def format_cell(mean: Mean | None) -> str:
    """0.57 [0.50, 0.63], or a dash."""
    return "–" if mean is None else f"{mean[0]:.2f} [{mean[1]:.2f}, {mean[2]:.2f}]"


def format_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def fill_page(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its marks, <!-- name --> and <!-- end -->."""
    for name, table in tables.items():
        marked = re.compile(rf"<!-- {re.escape(name)} -->.*?<!-- end -->", re.DOTALL)
        text = f"<!-- {name} -->\n\n{table}\n\n<!-- end -->"
        page = marked.sub(lambda _, text=text: text, page, count=1)
    return page


def save_figure(
    path: Path, points: list[list[Any]], height: float, draw: Callable[[list[list[Any]], Any], None]
) -> None:
    """Writes points as an SVG that contains their numbers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, height))
    draw(points, axes)
    notes = {"Date": None, "Description": json.dumps(points)}
    figure.savefig(path, bbox_inches="tight", metadata=notes)


def misplaced(
    shares: Mapping[str, float], pairs: Iterable[tuple[str, str]], margin: float
) -> list[str]:
    """A sentence for every (better, worse) pair whose better method is not ahead by the margin."""
    return [
        f"{better} ({shares[better]:.2f}) not above {worse} ({shares[worse]:.2f})"
        for better, worse in pairs
        if not shares[better] >= shares[worse] + margin
    ]
