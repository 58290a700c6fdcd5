"""Tables and plots of docs/evidence.md: ``python bench/quality/evidence.py [--work DIR]``.

With --work the scores there are collected into bench/results/quality.json first. The tables are
written between the marks of docs/evidence.md, the plots into docs/images.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import figures
from results import Table, collect
from tables import format_cell, format_table
from two_worlds import baselines_table, decisions_table, kinds_table, targets_table
from worlds import NAMES

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "docs/evidence.md", ROOT / "README.md")
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


def results_of(world: str) -> Path:
    """The file of a world's scores."""
    name = "quality" if world == NAMES[0] else f"quality_{world}"
    return ROOT / f"bench/results/{name}.json"


def read_results(world: str) -> Table:
    """Every scored row of a world."""
    return Table(json.loads(results_of(world).read_text())["rows"])


def readme_table(table: Table) -> str:
    shown = ("copy, strength 1", "**auto**", "`blocks`", "`prolora`", "`lora-x`")
    rows = [
        [name, *(format_cell(table.where(kind=k).share(METHODS[name])) for k in KINDS)]
        for name in shown
    ]
    return format_table(["", *KINDS], rows)


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
    filled = {"readme": readme_table(everything)}
    filled |= {"kinds": kinds_table(worlds), "targets": targets_table(worlds)}
    filled |= {"decisions": decisions_table(worlds)}
    if "icons" in worlds:
        filled["baselines"] = baselines_table(worlds["icons"])
    for page in PAGES:
        page.write_text(fill_page(page.read_text(), filled))
    figures.draw(everything, ROOT / "docs/images")


if __name__ == "__main__":
    main()
