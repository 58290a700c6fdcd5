"""Tables of moves between latent spaces: ``python crossing_tables.py [--work DIR]``.

With --work the rows that crossed.py and crossing_ideas.py left in DIR are collected first, into
bench/results/crossing.json. The tables are written between the marks of docs/fit_measured.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from crossed import PAIRS
from crossing_ideas import SHOWN, WAYS
from drawn import samples_table
from evidence import ROOT, fill_page, format_cell, format_table
from intervals import interval
from results import Mean, Row, git, round_numbers

from prolora.probe import gate

RESULTS = ROOT / "bench/results/crossing.json"
PAGE = ROOT / "docs/fit_measured.md"
WRITTEN = ("go", "weaken")
SAME_LATENT = "flow → ε, the same latent"
METHODS = {"probe": "", "recorded": "by recorded calls", "trained": "*trained on the same images*"}
"""Method -> its name; "" for that of the pair."""


def collect(work: Path, kept: dict) -> dict:
    """Every row of both studies in DIR, and the kept ones that it lacks.

    A row that was measured again keeps the score at strength 1 of the first as `before`.
    """
    made = {
        "scripts": ["bench/quality/crossed.py", "bench/quality/crossing_ideas.py"],
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": git("log", "-1", "--format=%cs"),
        "torch": torch.__version__,
        "threads": 1,
        "before": kept["made"],
    }
    keys = {"rows": ("pair", "seed", "adapter", "method"), "ideas": ("pair", "way", "adapter")}
    found = {}
    for part, folder in (("rows", "crossed"), ("ideas", "ideas")):
        row_by_key = {tuple(row[key] for key in keys[part]): row for row in kept[part]}
        for path in sorted((work / folder).glob("*.json")):
            row = json.loads(path.read_text())
            key = tuple(row[name] for name in keys[part])
            old = row_by_key.get(key, {})
            if "score_at_1" in old:
                row["before"] = old.get("before", old["score_at_1"])
            row_by_key[key] = round_numbers(row)
        found[part] = list(row_by_key.values())
    return {"made": made, "rows": found["rows"], "again": kept["again"], "ideas": found["ideas"]}


def at_chosen_strength(row: Row) -> Row:
    """The row at the strength that the gate of today takes, where another one was measured."""
    if row["strength"] >= 1 and "stronger" in row:
        raised = gate.raise_strength(1.0, row["share"]["all"], row["disagreement"]["all"])
        return row | {"score": score_at(row, raised)}
    weaker = row.get("weaker")
    if weaker and weaker["share"]["all"] - row["share"]["all"] >= gate.IMAGE_DOUBT:
        return row | weaker
    return row


def score_at(row: Row, strength: float) -> float:
    """By the parabola through 1, 1.5 and 2 in rows that were not scored at a strength."""
    stronger = row["stronger"]
    if (name := f"{strength:g}") in stronger:
        return stronger[name]
    scores = [row["score_at_1"], stronger["1.5"], stronger["2"]]
    t = 2 * (strength - 1)
    bend = scores[2] - 2 * scores[1] + scores[0]
    return scores[0] + t * (scores[1] - scores[0]) + t * (t - 1) / 2 * bend


def decide_row(row: Row) -> str:
    """What the gate says of a row, by its rule of today."""
    row = at_chosen_strength(row)
    effect = gate.Gain(**row["effect"])
    compared = row["disagreement"] if row["pair"] == SAME_LATENT else None
    verdict = (min(row["strength"], 1.0), row["share"], effect, None, None, compared)
    return gate.decide_on_images(*verdict)[0]


def mean_of(rows: list[Row], value: str) -> Mean | None:
    """Mean and 95 % interval over seeds and LoRAs."""
    values = {((row["pair"], row["seed"]), row["adapter"]): row[value] for row in rows}
    return interval(values) if values else None


def pairs_table(rows: list[Row]) -> str:
    """One line for each pair of settings."""
    lines = []
    for pair in PAIRS:
        part = [r for r in rows if r["pair"] == pair and r["adapter"] not in ("zero", "noise")]
        moved = [row for row in part if row["method"] == "probe"]
        trained = [row for row in part if row["method"] == "trained"]
        gated = [
            r | {"score": at_chosen_strength(r)["score"] * (decide_row(r) in WRITTEN)}
            for r in moved
        ]
        written = sum(decide_row(row) in WRITTEN for row in moved)
        shares = [row["share"]["all"] for row in moved]
        seeds = len({row["seed"] for row in moved})
        lines.append(
            [
                pair,
                f"{seeds} × {len(moved) // max(seeds, 1)}",
                f"**{format_cell(mean_of(moved, 'score_at_1'))}**",
                format_cell(mean_of(gated, "score")),
                f"{written} of {len(moved)}",
                format_cell(mean_of(trained, "score")),
                f"{min(shares):.2f} … {max(shares):.2f}",
            ]
        )
    head = ["pair", "seeds × LoRAs", "moved", "as gated", "go", "*trained on the same images*"]
    return format_table([*head, "held-out share"], lines)


def adapters_table(rows: list[Row]) -> str:
    """One line for each pair and way, a column for each LoRA."""
    adapters = [a for a in dict.fromkeys(r["adapter"] for r in rows) if a not in ("zero", "noise")]
    lines = []
    for pair in PAIRS:
        for method, name in METHODS.items():
            part = [r for r in rows if r["pair"] == pair and r["method"] == method]
            if not part:
                continue
            cells = []
            for adapter in adapters:
                scores = [r.get("score_at_1", r["score"]) for r in part if r["adapter"] == adapter]
                if not scores:
                    cells.append("–")
                    continue
                mean = sum(scores) / len(scores)
                spread = f" ({min(scores):.2f} … {max(scores):.2f})" if len(scores) > 1 else ""
                cells.append(f"{mean:.2f}{spread}")
            lines.append([name or pair, *cells])
    return format_table(["", *adapters], lines)


def again_table(rows: list[Row], again: list[Row]) -> str:
    """Scores at strength 1 by dense updates, by Gauss–Newton alone (where it ran), by the fit."""
    alone = {
        (r["pair"], r["adapter"]): r["score_at_1"] for r in again if r["steps"] == "Gauss–Newton"
    }
    lines = []
    for row in rows:
        if "before" in row:
            gauss = alone.get((row["pair"], row["adapter"])) if row["seed"] == 0 else None
            scores = [row["before"], gauss, row["score_at_1"]]
            cells = ["–" if score is None else f"{score:.2f}" for score in scores]
            lines.append([row["pair"], str(row["seed"]), row["adapter"], *cells])
    head = ["pair", "seed", "LoRA", "dense, cut to rank", "Gauss–Newton alone", "the fit"]
    return format_table(head, lines)


def strengths_table(rows: list[Row]) -> str:
    """By loss, and what is seen, above strength 1: the mean of each pair's LoRAs."""
    lines = []
    for pair in PAIRS:
        part = [row for row in rows if row["pair"] == pair and "stronger" in row]
        for adapter in dict.fromkeys(row["adapter"] for row in part):
            some = [row for row in part if row["adapter"] == adapter]
            names = {"1": "moved", "1.25": "", "1.5": "1.5", "2": "2"}
            losses = [
                {"1": r["score_at_1"], **r["stronger"]} | {"1.25": score_at(r, 1.25)} for r in some
            ]
            seen = "named" if adapter == "concept" else "style"
            known = seen in some[0]["drawn"]["moved"]
            cells = []
            for strength, name in names.items():
                loss = sum(row[strength] for row in losses) / len(some)
                drawn = known and all(name in r["drawn"] for r in some)
                looks = [r["drawn"][name][seen] for r in some] if drawn else []
                cells.append(f"{loss:.2f}" + (f", {sum(looks) / len(looks):.2f}" if looks else ""))
            best = [r["drawn"]["oracle"][seen] for r in some] if known else []
            trained = f"1, {sum(best) / len(best):.2f}" if best else "1"
            lines.append([f"{pair}, *{adapter}*", str(len(some)), *cells, trained])
    return format_table(
        ["pair, LoRA", "seeds", "at 1", "at 1.25", "at 1.5", "at 2", "trained there"], lines
    )


def effects_table(rows: list[Row]) -> str:
    """LoRAs without a meaning: what became of them."""
    lines = [
        [
            row["pair"],
            {"zero": "zeros", "noise": "random numbers"}[row["adapter"]],
            decide_row(row),
            f"{row['share']['all']:.2f}" if row["adapter"] == "noise" else "–",
            f"{row['score_at_1']:.2f}",
        ]
        for row in rows
        if row["adapter"] in ("zero", "noise")
    ]
    return format_table(["pair", "LoRA", "decision", "held-out share", "moved all the same"], lines)


def ideas_table(ideas: list[Row]) -> str:
    """One line for each way, a column for each LoRA."""
    adapters = list(dict.fromkeys(row["adapter"] for row in ideas))
    lines = []
    for way in WAYS:
        by_adapter = {r["adapter"]: r["score"] for r in ideas if r["way"] == way}
        if not by_adapter:
            continue
        mean = sum(by_adapter.values()) / len(by_adapter)
        cells = [f"{by_adapter[a]:.2f}" if a in by_adapter else "–" for a in adapters]
        lines.append([way, *cells, f"**{mean:.2f}**"])
    return format_table(["", *adapters, "mean"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder of crossed.py")
    options = parser.parse_args()
    if options.work:
        kept = json.loads(RESULTS.read_text())
        RESULTS.write_text(json.dumps(collect(options.work, kept), indent=0) + "\n")
    stored = json.loads(RESULTS.read_text())
    drawn = [row for row in stored["rows"] if row.get("drawn")]
    titles = {"moved": "fit"}
    tables = {
        "crossing": pairs_table(stored["rows"]),
        "crossing adapters": adapters_table(stored["rows"]),
        "crossing nothing": effects_table(stored["rows"]),
        "crossing again": again_table(stored["rows"], stored["again"]),
        "crossing strengths": strengths_table(stored["rows"]),
        "crossing samples": samples_table(drawn, lambda r: r["pair"], titles),
    }
    for name, pair in zip(("crossing ideas", "crossing ideas, look"), SHOWN, strict=True):
        tables[name] = ideas_table([row for row in stored["ideas"] if row["pair"] == pair])
    PAGE.write_text(fill_page(PAGE.read_text(), tables))


if __name__ == "__main__":
    main()
