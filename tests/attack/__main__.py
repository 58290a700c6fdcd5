"""Attacks on prolora: what must never happen is looked for, and counted.

    python tests/attack [HARNESS ...] [--scale 1] [--seed 0] [--only WORD] [--out rows.jsonl]

The harnesses, each a few minutes on two cores: `damage` (inputs cut off, flipped, edited),
`hostile` (files made to harm), `foreign` (files of others where results go), `options` (values that
no option takes) and `kills` (SIGKILL at any moment). A case that was found bad is run again with
the same seed, --only and --scale.
A row of JSON for each case, and a table. The exit code is 1 if anything bad was found.

equal      the result is that of the undamaged input, or of what the input now says
stated     the report says what is missing
done       exit code 0, where there is no result to compare with
refused    an exit code and a sentence, nothing written
partial    a result that is not whole, or a temporary file that stays
lost       an input was changed, or a result is missing at the end
replaced   a file that prolora did not write was replaced or deleted
twice      a LoRA of a collection was moved twice
silent     another result, exit code 0, and no word
hang       the time limit
traceback  an error that is not prolora's, or a crash
executed   code in a file ran
outside    something was written beside the results
escape     control characters of a file reached the terminal
memory     more than a bound
wordless   an exit code without a sentence
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from sandbox import BAD, GOOD, Box, Row, warm_up

HARNESSES = ("damage", "hostile", "foreign", "options", "kills")


def show(rows: list[Row]) -> str:
    """The figures as a table in Markdown: what never happened has no column of its own."""
    good = [name for name in GOOD if any(row.counts[name] for row in rows)]
    seen = [name for name in BAD if any(row.counts[name] for row in rows)]
    other = sorted({name for row in rows for name in row.counts} - {*BAD, *GOOD})
    names = ["runs", *good, *seen, *other]
    lines = ["| attack | case | " + " | ".join(names) + " |", "|---|---|" + "--:|" * len(names)]
    for row in rows:
        cells = [str(row.runs), *(str(row.counts[name]) for name in names[1:])]
        lines.append(f"| {row.harness} | {row.case} | " + " | ".join(cells) + " |")
    never = [name for name in BAD if name not in seen]
    return "\n".join([*lines, "", f"Not once: {', '.join(never)}."])


def read_rows(path: Path | None, seed: int, scale: float) -> list[Row]:
    """What an earlier run of the same attacks found, which is not done again."""
    if path is None or not path.exists():
        return []
    rows = [Row.from_json(line) for line in path.read_text().splitlines()]
    return [row for row in rows if (row.seed, row.scale) == (seed, scale)]


def main() -> None:
    """Runs the harnesses and shows what they found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("harness", nargs="*", choices=[[], *HARNESSES], help="default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only cases with this word in their name")
    parser.add_argument(
        "--out",
        type=Path,
        help="file that gets a line for each case; cases that it has are not done again",
    )
    args = parser.parse_args()
    rows = read_rows(args.out, args.seed, args.scale)
    there = {(row.harness, row.case) for row in rows}
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        warm_up(Box(Path(folder)))
    for name in args.harness or HARNESSES:
        for case, run in importlib.import_module(name).list_cases().items():
            if args.only not in case or (name, case) in there:
                continue
            work, began = Path(tempfile.mkdtemp(prefix="attack-")), time.monotonic()
            try:
                row = run(Box(work), args.scale, args.seed)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            row.seconds = round(time.monotonic() - began, 1)
            row.seed, row.scale = args.seed, args.scale
            rows.append(row)
            print(row.to_json(), flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(row.to_json() + "\n")
    print(show(rows))
    bad = sum(row.bad for row in rows)
    print(json.dumps({"runs": sum(row.runs for row in rows), "bad": bad}))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
