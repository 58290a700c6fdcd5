"""Writes what the last attacks found: bench/results/nightly.json, and a table in results.md.

python docs/make_attacks.py ROWS.jsonl ...     # rows of tests/attack and of its mutants.py
python docs/make_attacks.py --check            # does the table say what the file says?
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "nightly.json", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- written by docs/make_attacks.py -->", "<!-- end -->"
TITLES = {
    "hostile": "hostile files",
    "foreign": "files of others",
    "damage": "damage",
    "options": "odd values of options",
    "kills": "kills",
}
"""Harness -> the row of all of its cases."""

GOOD = {"equal", "stated", "refused", "done", "runs"}


def collect(paths: list[Path]) -> dict[str, Any]:
    """The rows of all files, with what they were made of."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    words = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    attacks = [row for row in rows if "harness" in row]
    return {
        "date": str(date.today()),
        "commit": commit.strip(),
        "seeds": sorted({row["seed"] for row in attacks}),
        "scales": sorted({row["scale"] for row in attacks}),
        "attacks": [
            {key: row[key] for key in ("harness", "case", "runs", "counts", "seconds", "facts")}
            for row in attacks
        ],
        "mutants": [
            {
                key: row[key]
                for key in ("file", "mutants", "tried", "killed", "survived", "untested")
            }
            for row in rows
            if "mutants" in row
        ],
    }


def render(facts: dict[str, Any]) -> str:
    """The table, and when it was made."""
    groups: dict[str, Counter[str]] = {}
    for row in facts["attacks"]:
        groups.setdefault(TITLES[row["harness"]], Counter()).update(
            {"runs": row["runs"], **row["counts"]}
        )
    lines = ["| attack | runs | bad |", "|---|--:|---|"]
    for name, counts in groups.items():
        bad = ", ".join(
            f"{number} {verdict}" for verdict, number in counts.items() if verdict not in GOOD
        )
        lines.append(f"| {name} | {counts['runs']} | {bad or 0} |")
    tried = sum(row["tried"] for row in facts["mutants"])
    sentence = f"Run on {facts['date']} at commit {facts['commit'][:10]}"
    if tried:
        killed = sum(row["killed"] for row in facts["mutants"])
        untested = sum(row["untested"] for row in facts["mutants"])
        sentence += (
            f". Of {tried} mutants in {len(facts['mutants'])} files tests noticed {killed}; "
            f"{untested} had none"
        )
    signals = sum(
        row["facts"].get(name, 0) for row in facts["attacks"] for name in ("SIGKILL", "SIGTERM")
    )
    return "\n".join([*lines, "", f"{sentence}. {signals} processes were killed."])


def main() -> None:
    """Writes or checks."""
    if sys.argv[1:] == ["--check"]:
        facts = json.loads(RESULTS.read_text("utf-8"))
    else:
        facts = collect([path for path in map(Path, sys.argv[1:]) if path.exists()])
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    page = f"{before}{BEGIN}\n\n{render(facts)}\n\n{END}{rest.split(END)[1]}"
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page, "utf-8")
    elif page != text:
        sys.exit(f"{PAGE.name} does not say what {RESULTS.name} says: run docs/make_attacks.py")


if __name__ == "__main__":
    main()
