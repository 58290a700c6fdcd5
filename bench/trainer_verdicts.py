"""What a program reads of trainers' files, compared with what `prolora check --for` says.

    python bench/trainer_verdicts.py PROGRAM CHECKOUT [--version V]
    python bench/trainer_verdicts.py again

The files have the names that trainers write (bench/results/trainers). PROGRAM's own code in the
folder CHECKOUT reads each of them, and what `prolora convert --for PROGRAM` makes of it. The counts
go into bench/results/trainer_verdicts.json. "again" asks `prolora check` alone, for the same files.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trainer_files
from loader_matrix import PROGRAM_ERRORS, describe_checkout, format_counts, number_parts
from loader_programs import PROGRAMS, Open, Read

from prolora import convert
from prolora.adapters.contents import parse_contents
from prolora.adapters.lora import Lora
from prolora.architectures.families import known_families
from prolora.checking.check import check
from prolora.checking.check_result import Check
from prolora.errors import UnsupportedFormat

RESULTS = Path(__file__).parent / "results/trainer_verdicts.json"


def compare_files(open_program: Open, program: str) -> Iterator[dict[str, Any]]:
    """Yields a row for each file whose model the program has."""
    for stored in sorted(trainer_files.RESULTS.glob("*.json")):
        for cell in trainer_files.read_cells(stored.stem)[1]:
            family = known_families().get(cell.family)
            if not cell.modules or not cell.layout or family is None:
                continue
            try:
                read = open_program(family, cell.layout)
            except PROGRAM_ERRORS:
                read = None
            if read is None:
                continue
            source = Lora.open(cell.make_tensors(rank=1), dict(cell.metadata))
            try:
                result = check(source, program=program)
            except UnsupportedFormat as error:
                print(stored.stem, cell.model, "refused:", error, flush=True)
                continue
            count, modules = count_read(source, read)
            row = {"trainer": stored.stem, "model": cell.model, "layout": cell.layout}
            row |= {"modules": modules, "read": count, "verdict": classify(result)}
            row["skips"] = count_skips(result)
            try:
                written = convert(source, format=program, dtype="float32").state_dict()
                opened = Lora.open(written, source.metadata)
                row["read once converted"] = count_read(opened, read)[0]
            except UnsupportedFormat as error:
                row["not converted"] = str(error)
            yield row


def count_read(source: Lora, read: Read) -> tuple[int, int]:
    """Returns the number of modules that the program reads, and the number in the file."""
    slots = parse_contents(source).slots
    keys = {name: [*slot.keys.values()] for slot in slots for name in slot.module.modules}
    tensors = number_parts({key: source.read(key) for key in source.tensors}, slots)
    try:
        taken = read(tensors, keys)
    except PROGRAM_ERRORS:
        taken = set()
    return sum(set(of) <= taken for of in keys.values()), len(keys)


def classify(result: Check) -> str:
    """Returns the verdict of `check`: "whole", "part", "none", "ambiguous" or "not tried".

    "warned": the program applies all that prolora understands of it, and that is not the whole.
    "ambiguous": the program applies all of it as one of the models that the names fit.
    """
    title, readers = result.program, result.readers
    sure = [reader for reader in readers.whole if reader not in readers.untried]
    if title in sure:
        return "warned" if result.left_out else "whole"
    if title in readers.part:
        return "part"
    if any(reader.startswith(f"{title} (as ") for reader in sure):
        return "ambiguous"
    return "none" if title in readers.none else "not tried"


def count_skips(result: Check) -> int | None:
    """Returns the number of updates that `check` counts as skipped; None if it has no number."""
    return None if result.skipped is None else sum(result.skipped.values())


def judge_again(stored: dict[str, Any]) -> None:
    """Replaces the verdicts of files whose modules were counted before."""
    files = {
        (file.stem, cell.model): cell
        for file in trainer_files.RESULTS.glob("*.json")
        for cell in trainer_files.read_cells(file.stem)[1]
    }
    for program, facts in stored.items():
        for row in facts["files"]:
            cell = files[row["trainer"], row["model"]]
            source = Lora.open(cell.make_tensors(rank=1), dict(cell.metadata))
            result = check(source, program=program)
            row |= {"verdict": classify(result), "skips": count_skips(result)}


def main() -> None:
    """Runs one program and stores its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=[*PROGRAMS, "again"], help="again: verdicts alone")
    parser.add_argument("checkout", type=Path, nargs="?")
    parser.add_argument("--version", default="", help="the program's own name of this version")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    if arguments.program == "again":
        judge_again(stored)
        RESULTS.write_text(format_counts(stored), "utf-8")
        return
    sys.argv = sys.argv[:1]
    open_program = PROGRAMS[arguments.program].open(arguments.checkout.resolve())
    rows = []
    for row in compare_files(open_program, arguments.program):
        rows.append(row)
        print(*row.values(), flush=True)
    stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    commit = describe_checkout(arguments.checkout)
    version = ", ".join(filter(None, [arguments.version, commit]))
    stored[arguments.program] = {"version": version, "files": rows}
    RESULTS.write_text(format_counts(stored), "utf-8")


if __name__ == "__main__":
    main()
