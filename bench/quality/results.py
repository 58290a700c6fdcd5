"""The study's scores as one file, and as numbers to put in tables.

`collect` reads what `study.py` left in its folder; the rest reads the collected JSON, which is what
the repository keeps.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from intervals import interval

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
    folder lacks (samples, ceilings) are not kept beside new losses.
    """
    rows = [dict(row) for row in kept.get("rows", [])]
    for path in sorted(work.glob("*/*-losses.json")):
        kind, seed = path.name.removesuffix("-losses.json").rsplit("-", 1)
        parts = {
            part: _read(path.with_name(f"{kind}-{seed}-{part}.json"))
            for part in ("losses", "chosen", "samples", "relation", "ceiling", "named")
        }
        for adapter, losses in parts["losses"].items():
            chosen = parts["chosen"].get(adapter, {})
            row = {"arch": path.parent.name, "kind": kind, "seed": int(seed), "adapter": adapter}
            row |= {"none": losses["none"], "oracle": losses["oracle"]}
            row["losses"] = losses["losses"] | chosen.get("losses", {})
            if "own" in losses:
                own = losses["own"]["losses"] | chosen.get("own", {}).get("losses", {})
                row["own"] = losses["own"] | {"losses": own}
            if named := parts["named"].get(adapter):
                row["named"] = {"losses": named["losses"], "related": named["verdict"]["related"]}
            if adapter in parts["ceiling"]:
                row["losses"]["ceiling"] = parts["ceiling"][adapter]
            row["verdict"] = chosen.get("verdict")
            row["relation"] = parts["relation"].get("means")
            row["samples"] = parts["samples"].get(adapter)
            rows.append(round_numbers(row))
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

    def best_copy(self) -> str:
        """The copy at the fixed strength that is best in the mean over these rows."""
        return best(self, COPIES)

    def difference(self, label: str, other: str) -> Mean | None:
        """The mean of what `label` recovers more than `other`, row by row."""

        def value(row: Row) -> float | None:
            ours, theirs = recovered(row, label), recovered(row, other)
            return None if ours is None or theirs is None else ours - theirs

        return self.mean(value)


def best(table: Table, labels: Iterable[str]) -> str:
    """The label with the highest mean share; the first of them where nothing was run."""
    labels = list(labels)
    means = {label: mean[0] for label in labels if (mean := table.share(label))}
    return max(means, key=lambda label: means[label]) if means else labels[0]
