"""Tables of docs/evidence.md: ``python bench/quality/evidence.py [--work DIR]``.

With --work the scores there are collected into bench/results/quality.json first. The tables are
written between the marks of the pages.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from before_after import before_after_table, samples_table
from results import Table, collect
from tables import format_cell, format_table
from two_worlds import baselines_table
from worlds import NAMES

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "docs/evidence.md", ROOT / "README.md")
RELATED = ("near", "far", "pruned", "continued")
KINDS = (*RELATED, "independent")


def results_of(world: str) -> Path:
    """The file of a world's scores."""
    name = "quality" if world == NAMES[0] else f"quality_{world}"
    return ROOT / f"bench/results/{name}.json"


def read_results(world: str) -> Table:
    """Every scored row of a world."""
    return Table(json.loads(results_of(world).read_text())["rows"])


def readme_table(table: Table) -> str:
    shown = {"copy": "copy @ 1", "copy at 0.6": "copy @ 0.6", "`prolora`": "prolora 0.99 @ 1"}
    rows = [
        [name, *(format_cell(table.where(kind=k).share(label)) for k in KINDS)]
        for name, label in shown.items()
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
    tables: dict[str, str] = {
        "readme": readme_table(everything),
        "before after": before_after_table(worlds),
        "samples": samples_table(everything),
    }
    if "icons" in worlds:
        tables["baselines"] = baselines_table(worlds["icons"])
    for page in PAGES:
        page.write_text(fill_page(page.read_text(), tables))


if __name__ == "__main__":
    main()
