"""Tables and plots of docs/evidence.md: ``python bench/quality/evidence.py [--work DIR]``.

With --work the scores there are collected into bench/results/quality.json first. The tables are
written between the marks of docs/evidence.md, the plots into docs/images.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import figures
from results import COPIES, Row, Table, best, collect
from tables import format_cell, format_table
from two_worlds import baselines_table, decisions_table, kinds_table, targets_table
from worlds import NAMES

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "docs/evidence.md", ROOT / "docs/study.md", ROOT / "README.md")
RELATED = ("near", "far", "pruned", "continued")
KINDS = (*RELATED, "independent")
METHODS = {
    "copy, strength 1": "copy @ 1",
    "**auto**": "auto",
    "copy, automatic strength": "copy, automatic strength",
    "copy, strength by module": "copy, strength by module",
    "`damped`, κ = 1": "damped, κ 1",
    "`damped`, κ = 4": "damped, κ 4",
    "`damped`, κ = 16": "damped, κ 16",
    "`blocks`": "blocks 0.9 @ 1",
    "`blocks`, automatic strength": "blocks, automatic strength",
    "`prolora`": "prolora 0.9 @ 1",
    "`prolora`, strength 1.5": "prolora 0.9 @ 1.5",
    "`prolora`, norm restored": "prolora 0.9 norm restored @ 1",
    "`subspace`": "subspace 0.9 @ 1",
    "`lora-x`": "lora-x 0.9 @ 1",
    "CASA (rank 4r)": "casa @ 1",
    "copy + dropped blocks' updates": "summed @ 1",
}
ABLATION = {
    "energy 0.5": "prolora 0.5 @ 1",
    "energy 0.8": "prolora 0.8 @ 1",
    "energy 0.9": "prolora 0.9 @ 1",
    "energy 0.99": "prolora 0.99 @ 1",
    "k = d/4": "prolora d/4 @ 1",
    "k = d/2": "prolora d/2 @ 1",
    "k = 3d/4": "prolora 3d/4 @ 1",
    "energy 0.9, Φ ≥ 0.8": "prolora 0.9 gated 0.8 @ 1",
    "energy 0.9, Φ ≥ 0.9": "prolora 0.9 gated 0.9 @ 1",
    "no complement (`subspace`), energy 0.9": "subspace 0.9 @ 1",
    "no complement (`subspace`), k = d/2": "subspace d/2 @ 1",
}


def results_of(world: str) -> Path:
    """The file of a world's scores."""
    name = "quality" if world == NAMES[0] else f"quality_{world}"
    return ROOT / f"bench/results/{name}.json"


def read_results(world: str) -> Table:
    """Every scored row of a world."""
    return Table(json.loads(results_of(world).read_text())["rows"])


def methods_table(table: Table) -> str:
    rows = []
    for name, label in METHODS.items():
        rows.append([name, *(format_cell(table.where(kind=k).share(label)) for k in KINDS)])
    best_copies = [table.where(kind=kind).best_copy() for kind in KINDS]
    fixed = [
        f"{format_cell(table.where(kind=kind).share(label))} at {label.removeprefix('copy @ ')}"
        for kind, label in zip(KINDS, best_copies, strict=True)
    ]
    rows.insert(1, ["copy, best fixed strength for the kind", *fixed])
    ceiling = ["*ceiling: strengths by module fitted to the target's data, one seed*"]
    rows.append(
        [*ceiling, *(format_cell(table.where(kind=k, seed=0).share("ceiling")) for k in KINDS)]
    )
    return format_table(["", *KINDS], rows)


def readme_table(table: Table) -> str:
    shown = ("copy, strength 1", "**auto**", "`blocks`", "`prolora`", "`lora-x`")
    rows = [
        [name, *(format_cell(table.where(kind=k).share(METHODS[name])) for k in KINDS)]
        for name in shown
    ]
    return format_table(["", *KINDS], rows)


def difference_table(table: Table) -> str:
    rows = []
    for name, part in (*((k, table.where(kind=k)) for k in RELATED), ("all four", table)):
        part = part.where(kind=RELATED)
        fixed = part.best_copy()
        rows.append(
            [
                name,
                format_cell(part.share("auto")),
                format_cell(part.difference("auto", "copy @ 1")),
                f"{format_cell(part.difference('auto', fixed))} "
                f"(at {fixed.removeprefix('copy @ ')})",
                format_cell(part.difference("copy, automatic strength", fixed)),
                format_cell(part.difference("auto", "prolora 0.9 @ 1")),
            ]
        )
    head = [
        "",
        "auto",
        "auto − copy at 1",
        "auto − copy at its best",
        "copy at automatic − at its best",
        "auto − `prolora`",
    ]
    return format_table(head, rows)


def adapters_table(table: Table) -> str:
    rows = []
    for kind in RELATED:
        for adapter in sorted({row["adapter"] for row in table.rows}):
            part = table.where(kind=kind, adapter=adapter)
            fixed = part.best_copy()
            labels = ("copy @ 1", fixed, "auto", "blocks 0.9 @ 1", "prolora 0.9 @ 1")
            cells = [format_cell(part.share(label)) for label in labels]
            cells[1] += f" at {fixed.removeprefix('copy @ ')}"
            rows.append([kind, adapter, *cells])
    return format_table(["", "", "copy at 1", "at its best", "auto", "`blocks`", "`prolora`"], rows)


def ablation_table(table: Table) -> str:
    rows = [
        [name, *(format_cell(table.where(kind=kind).share(label)) for kind in RELATED)]
        for name, label in ABLATION.items()
    ]
    return format_table(["`prolora` with", *RELATED], rows)


def samples_table(table: Table, adapters: tuple[str, ...], score: str) -> str:
    labels = ("none", "copy", "prolora 0.9", "blocks 0.9", "auto", "oracle")
    rows = []
    for kind in RELATED:
        part = table.where(kind=kind, adapter=adapters)
        cells = []
        for label in labels:

            def value(row: Row, label: str = label) -> float | None:
                return (row["samples"] or {}).get(label, {}).get(score)

            mean = part.mean(value)
            cells.append("–" if mean is None else f"{mean[0]:.3f} [{mean[1]:.3f}, {mean[2]:.3f}]")
        rows.append([kind, *cells])
    head = ["", "no adapter", "copy", "`prolora`", "`blocks`", "auto", "trained on the target"]
    return format_table(head, rows)


def verdict_table(table: Table) -> str:
    rows = []
    kinds = dict.fromkeys(row["kind"] for row in table.rows if row["verdict"])
    for kind in sorted(kinds, key=lambda k: (k not in KINDS, KINDS.index(k) if k in KINDS else 0)):
        for arch in ("unet", "flux"):
            part = Table([r for r in table.where(kind=kind, arch=arch).rows if r["verdict"]])
            if not part.rows:
                continue
            verdicts = [row["verdict"] for row in part.rows]

            def span(key: str, form: str, verdicts: list[dict] = verdicts) -> str:
                values = [v[key] for v in verdicts]
                low, high = format(min(values), form), format(max(values), form)
                return low if low == high else f"{low} … {high}"

            go = sum(v["go"] for v in verdicts)
            tried = [label for label in ("damped, κ 4", *COPIES)]
            rows.append(
                [
                    kind,
                    arch,
                    span("drift", ".2f"),
                    span("cosine", ".2f"),
                    span("spread", ".2f"),
                    span("kappa", ".1f"),
                    f"{go} of {len(verdicts)}",
                    format_cell(part.share("copy @ 1")),
                    format_cell(part.share(best(part, tried))),
                ]
            )
    head = [
        "",
        "",
        "drift",
        "cosine",
        "spread",
        "κ",
        "go",
        "copy at 1",
        "best of κ 4 and copies",
    ]
    return format_table(head, rows)


def fill_page(page: str, tables: dict[str, str]) -> str:
    """The page with each table between its marks, <!-- name --> and <!-- end -->."""
    for name, table in tables.items():
        marked = re.compile(rf"<!-- {re.escape(name)} -->.*?<!-- end -->", re.DOTALL)
        text = f"<!-- {name} -->\n\n{table}\n\n<!-- end -->"
        page = marked.sub(lambda _, text=text: text, page, count=1)
    return page


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
    print(kinds_table(worlds))
    tables: dict[str, Callable[[Table], str]] = {
        "readme": readme_table,
        "methods": methods_table,
        "differences": difference_table,
        "held-out seeds": lambda t: difference_table(Table([r for r in t.rows if r["seed"]])),
        "adapters": adapters_table,
        "ablation": ablation_table,
        "style distance": lambda t: samples_table(t, ("thick", "slanted"), "mmd"),
        "concept": lambda t: samples_table(t, ("concept",), "concept"),
        "few steps": lambda t: samples_table(t, ("fewstep",), "mmd"),
        "digits": lambda t: samples_table(t, ("thick", "slanted", "fewstep"), "digit"),
        "diversity": lambda t: samples_table(t, ("thick", "slanted", "concept"), "diversity"),
        "verdicts": verdict_table,
    }
    filled = {name: make(everything) for name, make in tables.items()}
    filled |= {"kinds": kinds_table(worlds), "targets": targets_table(worlds)}
    filled |= {"decisions": decisions_table(worlds)}
    if "icons" in worlds:
        filled["baselines"] = baselines_table(worlds["icons"])
    for page in PAGES:
        page.write_text(fill_page(page.read_text(), filled))
    figures.draw(everything, ROOT / "docs/images")


if __name__ == "__main__":
    main()
