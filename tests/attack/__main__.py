"""Runs attacks on prolora and counts what came of them; README.md says what each word means."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from sandbox import GOOD, Box, Row, warm_up

HARNESSES = ("damage", "hostile", "foreign", "options", "kills")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("harness", nargs="*", choices=[[], *HARNESSES], help="default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only cases with this word in their name")
    parser.add_argument("--out", type=Path, help="gets a line a case; its cases are not repeated")
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out and args.out.exists() else []
    rows = [Row.from_json(line) for line in lines]
    rows = [row for row in rows if (row.seed, row.scale) == (args.seed, args.scale)]
    there = {(row.harness, row.case) for row in rows}
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        warm_up(Box(Path(folder)))
    scripts = [(h, p) for h in args.harness or HARNESSES for p in find_scripts(h)]
    for harness, script in scripts:
        for case, run in importlib.import_module(script.stem).CASES.items():
            if args.only not in case or (harness, case) in there:
                continue
            row = Row(harness, case, seed=args.seed, scale=args.scale)
            work, began = Path(tempfile.mkdtemp(prefix="attack-")), time.monotonic()
            try:
                run(Box(work), row)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            row.seconds = round(time.monotonic() - began, 1)
            rows.append(row)
            print(row.to_json(), flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(row.to_json() + "\n")
    print(show(rows))
    bad = sum(row.bad for row in rows)
    print(json.dumps({"runs": sum(row.runs for row in rows), "bad": bad}))
    sys.exit(bool(bad))


def find_scripts(harness: str) -> list[Path]:
    return sorted(Path(__file__).parent.glob(f"{harness}_*.py"))


def show(rows: list[Row]) -> str:
    """The figures as a table in Markdown; verdicts that never came have no column."""
    seen = {name for row in rows for name in row.counts if row.counts[name]}
    names = ["runs", *(name for name in GOOD if name in seen), *sorted(seen - {*GOOD})]
    lines = ["| attack | case | " + " | ".join(names) + " |", "|---|---|" + "--:|" * len(names)]
    for row in rows:
        cells = [str(row.runs), *(str(row.counts[name]) for name in names[1:])]
        lines.append(f"| {row.harness} | {row.case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
