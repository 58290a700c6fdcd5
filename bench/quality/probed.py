"""Tables of probing for docs/fit_measured.md: ``python bench/quality/probed.py [--work DIR]``.

With --work the rows that probing.py left in DIR/probing are collected first, into the results of
--world. Decisions are the gate's at its limits of today; those of rows that were measured before
the gate knew gains are by the rule of that time.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from drawn import samples_table
from evidence import ROOT, fill_page, format_cell, format_table
from results import Row, Table, git, round_numbers

from prolora.probe import gate

RESULTS = {
    "digits": ROOT / "bench/results/probing.json",
    "icons": ROOT / "bench/results/probing_icons.json",
}
PAGE = ROOT / "docs/fit_measured.md"
TARGETS = {
    "unrelated, same shape: transformers": ("flux", "flux", "independent"),
    "unrelated, same shape: UNets": ("unet", "unet", "independent"),
    "unrelated, other width and depth: transformers": ("flux", "flux", "resized"),
    "transformer → unrelated UNet": ("flux", "unet", "independent"),
    "UNet → unrelated transformer": ("unet", "flux", "independent"),
}
FAR = {"transformers": ("flux", "flux", "far"), "UNets": ("unet", "unet", "far")}
RELATED = {
    "fine-tuned a little (*near*): transformers": ("flux", "flux", "near"),
    "fine-tuned a little (*near*): UNets": ("unet", "unet", "near"),
    "trained on (*continued*): transformers": ("flux", "flux", "continued"),
    "trained on (*continued*): UNets": ("unet", "unet", "continued"),
}
ICONS = {
    "trained apart (*independent*)": "independent",
    "trained apart from one start (*same start*)": "same start",
    "other width and depth (*resized*)": "resized",
    "few-step student": "few-step",
    "student of its guidance (*guided*)": "guided",
    "without two blocks (*pruned*)": "pruned",
}
KEYS = ("name", "method", "arch", "to", "kind", "seed", "adapter")
SHORT = "short"
"""Name of the rows with a fifth of the samples, where the start of a fit is looked at."""
OPTIMISERS = ("gauss-newton", "adamw", "then")
"""Names of rows at as many predictions by other steps: all of one kind, or AdamW's of 1e-3 last."""
HALVES = "halves"
"""Name of rows from a copy whose second half was made as from zero."""
CURVES = ("images", "batch", "probes", "steps", "damping", "rank")
DEFAULTS = {"images": 24, "batch": 48, "probes": 1152, "steps": 32, "damping": 1, "rank": 32}


def collect(work: Path, kept: dict) -> dict:
    """Every row in DIR/probing that belongs to a named set of options, and the kept ones.

    Rows that were collected earlier stay where they were not measured again; one that was keeps the
    score of the first as `before`.
    """
    row_by_key = {identify(row): row for row in kept.get("rows", [])}
    for path in sorted((work / "probing").glob("*.json")):
        name = path.name.split(",")[0]
        named = name in ("study", "related", "equal rank", SHORT, HALVES, *OPTIMISERS)
        if named or name.split()[0] in CURVES:
            row = json.loads(path.read_text()) | {"name": name}
            row.pop("history", None)
            if (old := row_by_key.get(identify(row))) is not None:
                row["before"] = old.get("before", old["score"])
            row_by_key[identify(row)] = round_numbers(row)
    made = {
        "script": "bench/quality/probing.py",
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": git("log", "-1", "--format=%cs"),
        "torch": torch.__version__,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
    }
    before = {"before": kept["made"]} if kept else {}
    return {"made": made | before, "rows": list(row_by_key.values())}


def identify(row: Row) -> tuple:
    """What tells a row from all others."""
    return tuple(row[key] for key in KEYS)


def select_rows(table: Table, where: tuple[str, str, str], **wanted: object) -> Table:
    """The study's rows of one kind of target."""
    arch, to, kind = where
    wanted = {"name": "study", "method": "probe"} | wanted
    return table.where(arch=arch, to=to, kind=kind, **wanted)


def decide_row(row: Row) -> str:
    """What the gate of today says of a row."""
    gain = gate.Gain(**row["gain"]) if row.get("gain") else None
    if row.get("by_images"):
        if row["decision"] == gate.COPY and row["guided"] and gain and gain.lowest > 0:
            return gate.GO
        return str(row["decision"])
    if "gain" not in row:
        return decide_as_then(row)
    verdict = (row["strength"], row["share"], row["disagreement"], row["copy_share"])
    least = gate.least_gain(row["disagreement"]["all"], row["start"])
    return gate.decide_gate(*verdict, gain, 0.0 if row.get("guided") else least)[0]


def decide_as_then(row: Row) -> str:
    """The gate's rule until rows had gains: disagreement in units of the LoRA's own change."""
    share, difference = row["share"], largest_disagreement(row)
    copied = row["copy_share"]["all"] if row["copy_share"] else float("-inf")
    keeps_copy = copied >= 0.5 and difference > 0.35
    if difference > 3 and not keeps_copy:
        return gate.REFUSE
    if keeps_copy or copied >= share["all"]:
        return gate.COPY
    if min(share[origin] for origin in ("adapted", "target")) < gate.MIN_SHARE:
        return gate.REFUSE
    return gate.GO if row["strength"] == 1 else gate.WEAKEN


def gated_score(row: Row) -> float:
    """What `--method probe` writes is worth: the copy, or nothing, where the gate says so."""
    if decide_row(row) in (gate.GO, gate.WEAKEN):
        return float(row["score"])
    return row["copy"] or 0.0


def ratio(row: Row) -> float:
    """Processor time of all but sampling over that of sampling."""
    seconds = row["seconds"]
    return sum(seconds.values()) / seconds["sample"] - 1


def largest_disagreement(row: Row) -> float:
    """The disagreement that the gate looks at."""
    return max(row["disagreement"][origin] for origin in ("adapted", "target"))


def span(values: list[float], form: str = ".2f") -> str:
    """Lowest … highest."""
    return f"{min(values):{form}} … {max(values):{form}}" if values else "–"


def score(row: Row) -> float:
    """Share of the gap recovered, without the gate."""
    return float(row["score"])


def targets_table(table: Table) -> str:
    lines = []
    for name, where in TARGETS.items():
        part = select_rows(table, where)
        if not part.rows:
            continue
        decisions = [decide_row(row) for row in part.rows]
        yes = sum(d in (gate.GO, gate.WEAKEN) for d in decisions)
        copied = part.mean(lambda row: row["copy"])
        seeds = len({row["seed"] for row in part.rows})
        lines.append(
            [
                name,
                f"{seeds} × {len(part.rows) // seeds}",
                f"**{format_cell(part.mean(score))}**",
                format_cell(part.mean(gated_score)),
                format_cell(copied),
                format_cell(part.mean(lambda r: r["share"]["all"])),
                span([largest_disagreement(row) for row in part.rows]),
                f"{yes} of {len(decisions)}",
                format_cell(part.mean(ratio)),
            ]
        )
    head = [
        "target",
        "seeds × LoRAs",
        "probe",
        "as gated",
        "copy",
        "held-out share",
        "disagreement",
        "go",
        "fitting / sampling",
    ]
    return format_table(head, lines)


def adapters_table(table: Table) -> str:
    names = ("thick", "slanted", "concept", "fewstep")
    lines = []
    for name, where in TARGETS.items():
        part = select_rows(table, where)
        if part.rows:
            means = [part.where(adapter=adapter).mean(score) for adapter in names]
            lines.append([name, *(format_cell(mean) for mean in means)])
    return format_table(["target", *names], lines)


def ceiling_table(table: Table) -> str:
    lines = []
    for name, where in TARGETS.items():
        trained = select_rows(table, where, method="distilled")
        keys = {(row["seed"], row["adapter"]) for row in trained.rows}
        rows = [r for r in select_rows(table, where).rows if (r["seed"], r["adapter"]) in keys]
        ours = Table(rows)
        if not rows:
            continue
        same = select_rows(table, where, name="equal rank")
        means = [ours.mean(score), trained.mean(score)]
        seconds = [
            sum(sum(row["seconds"].values()) - row["seconds"]["sample"] for row in part.rows)
            / len(part.rows)
            for part in (ours, trained)
        ]
        lines.append(
            [
                name,
                str(len(rows)),
                *(format_cell(mean) for mean in means),
                f"{means[0][0] / means[1][0]:.2f}",
                format_cell(same.mean(score)),
                f"{seconds[0]:.1f} s",
                f"{seconds[1]:.1f} s",
            ]
        )
    head = [
        "target",
        "rows",
        "probe",
        "*distilled*",
        "ratio",
        "probe, rank 8",
        "time of probe",
        "time of *distilled*",
    ]
    return format_table(head, lines)


def far_table(table: Table) -> str:
    lines = []
    for name, where in FAR.items():
        part = select_rows(table, where)
        if not part.rows:
            continue
        no = sum(decide_row(row) in (gate.REFUSE, gate.COPY) for row in part.rows)

        def gain(row: Row) -> float | None:
            return None if row["copy"] is None else gated_score(row) - row["copy"]

        worst = min(value for row in part.rows if (value := gain(row)) is not None)
        lines.append(
            [
                name,
                str(len(part.rows)),
                format_cell(part.mean(score)),
                format_cell(part.mean(lambda row: row["copy"])),
                format_cell(part.mean(gated_score)),
                f"{worst:.2f}",
                format_cell(part.mean(lambda r: r["share"]["all"])),
                span([largest_disagreement(row) for row in part.rows]),
                f"{no} of {len(part.rows)}",
            ]
        )
    head = [
        "far fine-tune",
        "rows",
        "probe, forced",
        "copy",
        "as gated",
        "worst gated − copy",
        "held-out share",
        "disagreement",
        "refused or copied",
    ]
    return format_table(head, lines)


def related_table(table: Table) -> str:
    lines = []
    for name, where in RELATED.items():
        part = select_rows(table, where, name="related")
        if not part.rows:
            continue
        fitted = sum(decide_row(row) in (gate.GO, gate.WEAKEN) for row in part.rows)
        gains = [gated_score(row) - row["copy"] for row in part.rows]
        lines.append(
            [
                name,
                str(len(part.rows)),
                format_cell(part.mean(lambda row: row["copy"])),
                format_cell(part.mean(score)),
                f"{fitted} of {len(part.rows)}",
                format_cell(part.mean(gated_score)),
                format_cell(part.mean(lambda row: gated_score(row) - row["copy"])),
                f"{min(gains):.2f}",
                span([largest_disagreement(row) for row in part.rows]),
            ]
        )
    head = [
        "target",
        "rows",
        "copy",
        "probe, forced",
        "fit taken",
        "as gated",
        "gated − copy",
        "worst gated − copy",
        "disagreement",
    ]
    return format_table(head, lines)


def curves_table(table: Table) -> str:
    base = table.where(
        name="study",
        method="probe",
        arch="flux",
        to="flux",
        kind="independent",
        seed=0,
        adapter="slanted",
    ).rows
    lines = []
    for curve in CURVES:
        row_by_value = dict.fromkeys([DEFAULTS[curve]], base[0]) if base else {}
        for row in table.rows:
            if row["name"].split()[0] == curve:
                row_by_value[json.loads(row["name"].split()[1])] = row
        for value in sorted(row_by_value):
            row = row_by_value[value]
            lines.append(
                [
                    curve,
                    f"**{value}**" if value == DEFAULTS[curve] else str(value),
                    f"{row['score']:.2f}",
                    f"{row['share']['all']:.3f}",
                    f"{row['seconds']['fit'] + row['seconds']['draw']:.1f} s",
                    f"{ratio(row):.1f}",
                ]
            )
    return format_table(
        ["option", "value", "score", "held-out share", "drawing and fit", "fitting / sampling"],
        lines,
    )


def starts_table(table_by_world: dict[str, Table]) -> str:
    """The short rows, where fits may start from the copy."""
    lines = []
    for world, table in table_by_world.items():
        rows = table.where(name=SHORT, method="probe").rows
        for row in sorted(rows, key=lambda row: (row["kind"], row["seed"], row["adapter"])):
            ceiling = table.where(**dict(zip(KEYS, identify(row), strict=True), method="distilled"))
            gain = row["gain"]
            lines.append(
                [
                    f"{row['kind']}, {world}",
                    row["adapter"],
                    "–" if row["copy"] is None else f"{row['copy']:.2f}",
                    f"{row['score_at_1']:.2f}",
                    f"{gated_score(row):.2f}",
                    decide_row(row),
                    f"{row['start']}, {row['trust']:.0%}",
                    f"{gain['share']:.2f} ± {gate.SURE * gain['error']:.2f}" if gain else "–",
                    f"{row['disagreement']['all']:.3f}",
                    format_cell(ceiling.mean(score)),
                ]
            )
    head = ["target", "LoRA", "copy", "probe, forced", "as gated", "decision", "start, trust"]
    return format_table([*head, "held-out gain", "disagreement", "*distilled*"], lines)


def icons_table(table: Table) -> str:
    """Probing of the transformers of the second world, with the library's usual settings."""
    lines = []
    for name, kind in ICONS.items():
        where = ("flux", "flux", kind)
        part = select_rows(table, where)
        if not part.rows:
            continue
        trained = select_rows(table, where, method="distilled")
        gains = [gated_score(row) - (row["copy"] or 0.0) for row in part.rows]
        seeds = len({row["seed"] for row in part.rows})
        yes = sum(decide_row(row) in (gate.GO, gate.WEAKEN) for row in part.rows)
        lines.append(
            [
                name,
                f"{seeds} × {len(part.rows) // seeds}",
                format_cell(part.mean(lambda row: row["copy"])),
                format_cell(part.mean(score)),
                f"**{format_cell(part.mean(gated_score))}**",
                f"{min(gains):+.2f} … {max(gains):+.2f}",
                f"{yes} of {len(part.rows)}",
                span([largest_disagreement(row) for row in part.rows]),
                format_cell(trained.mean(score)),
            ]
        )
    head = ["target", "seeds × LoRAs", "copy", "probe, forced", "as gated", "gated − copy", "go"]
    return format_table([*head, "disagreement", "*distilled*"], lines)


def icons_adapters_table(table: Table) -> str:
    """The same, LoRA by LoRA: the copy → what is written."""
    names = ("neon", "duotone", "concept", "fewstep")
    lines = []
    for name, kind in ICONS.items():
        part = select_rows(table, ("flux", "flux", kind))
        cells = []
        for adapter in names:
            rows = part.where(adapter=adapter)
            means = rows.mean(lambda row: row["copy"] or 0.0), rows.mean(gated_score)
            both = all(mean is not None for mean in means) and bool(rows.rows)
            cells.append(f"{means[0][0]:.2f} → {means[1][0]:.2f}" if both else "–")
        if part.rows:
            lines.append([name, *cells])
    return format_table(["target", *names], lines)


def replaced_table(table: Table) -> str:
    """Scores of the fit of dense updates, cut to rank, → those of the fit in factors."""
    names = ("neon", "duotone", "concept", "fewstep")
    lines = []
    for name, kind in ICONS.items():
        part = select_rows(table, ("flux", "flux", kind))
        rows = {r["adapter"]: r for r in part.rows if "before" in r}
        cells = [
            f"{rows[a]['before']:.3f} → {rows[a]['score']:.3f}" if a in rows else "–" for a in names
        ]
        if rows:
            changes = [row["score"] - row["before"] for row in rows.values()]
            lines.append([name, *cells, f"{sum(changes) / len(changes):+.3f}"])
    return format_table(["target", *names, "mean"], lines)


def optimisers_table(table: Table) -> str:
    """LoRA by LoRA from zero, on the same probes: each way of taking the steps, and the fit."""
    lines = []
    for name, kind in ICONS.items():
        where = ("flux", "flux", kind)
        parts = {n: select_rows(table, where, name=n) for n in (*OPTIMISERS, "study")}
        scores = {
            n: {r["adapter"]: r["score"] for r in part.rows if r["seed"] == 1}
            for n, part in parts.items()
        }
        for adapter in scores["gauss-newton"]:
            found = [scores[n].get(adapter) for n in parts]
            best = max(score for score in found if score is not None)
            cells = [
                "–" if s is None else f"**{s:.3f}**" if s == best else f"{s:.3f}" for s in found
            ]
            lines.append([name, adapter, *cells])
    head = ["target", "LoRA", "Gauss–Newton", "AdamW", "half, then AdamW at 1e-3", "the fit"]
    return format_table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="the study's folder")
    parser.add_argument("--world", choices=RESULTS, default="digits", help="of --work")
    options = parser.parse_args()
    if options.work:
        path = RESULTS[options.world]
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(collect(options.work, kept), indent=0) + "\n")
    table_by_world = {
        world: Table(json.loads(path.read_text())["rows"])
        for world, path in RESULTS.items()
        if path.exists()
    }
    everything = table_by_world["digits"]
    tables: dict[str, Callable[[Table], str]] = {
        "probing": targets_table,
        "probing adapters": adapters_table,
        "probing ceiling": ceiling_table,
        "probing far": far_table,
        "probing related": related_table,
        "probing curves": curves_table,
    }
    filled = {name: make(everything) for name, make in tables.items()}
    filled["probing starts"] = starts_table(table_by_world)
    filled["probing icons"] = icons_table(table_by_world["icons"])
    filled["probing icons adapters"] = icons_adapters_table(table_by_world["icons"])
    filled["probing replaced"] = replaced_table(table_by_world["icons"])
    drawn = [row for row in table_by_world["icons"].rows if row.get("drawn")]
    titles = {"copy": "copy", "fit": "fit", "fit @ 1.25": "fit, at 1.25"}
    filled["probing samples"] = samples_table(drawn, lambda row: row["kind"], titles)
    filled["probing optimisers"] = optimisers_table(table_by_world["icons"])
    PAGE.write_text(fill_page(PAGE.read_text(), filled))


if __name__ == "__main__":
    main()
