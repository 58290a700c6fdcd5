"""What became of a plan in a folder, from its journals and results alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from ...errors import UnsupportedFormat
from ...files.state import read_state
from ...files.writing import write_text_atomically
from .plan import Entry, Plan
from .records import JournalReader, Record
from .worker import RESULTS

FAILED = "failed.jsonl"
"""The file, in the folder of the results, with a line for each LoRA that failed."""

State = Literal["done", "failed", "refused", "left"]


def read_outcomes(
    plan: Plan, folder: Path, reader: JournalReader | None = None
) -> Iterator[tuple[Entry, State, Record | None]]:
    """What became of each entry of a plan, in its order, and the record that says so.

    Journals have no common clock. A success counts whatever else there is, as long as its result is
    there.

    Args:
        plan: the plan.
        folder: of the results.
        reader: has read none of the journals yet.
    """
    keys = {plan.key(entry) for entry in plan.entries if not entry.refused}
    present = list_results(folder)
    done: dict[str, Record] = {}
    failed: dict[str, Record] = {}
    for _, record in (reader or JournalReader(folder)).read_new():
        if record.key not in keys:
            continue
        if record.status == "failed":
            failed[record.key] = record
        elif record.out in present:
            earlier = done.get(record.key)
            # That a result was there already says less than the record of the move itself.
            if earlier is None or earlier.coverage is None or record.coverage is not None:
                done[record.key] = record
    for entry in plan.entries:
        key = "" if entry.refused else plan.key(entry)
        if entry.refused:
            yield entry, "refused", None
        elif key in done:
            yield entry, "done", done[key]
        elif key in failed:
            yield entry, "failed", failed[key]
        else:
            yield entry, "left", None


def list_results(folder: Path) -> set[str]:
    """The results that are in a folder, as records name them."""
    results: set[str] = set()
    with suppress(OSError):
        for target in os.scandir(folder / RESULTS):
            with suppress(OSError):
                names = os.listdir(target)
                results |= {f"{RESULTS}/{target.name}/{name}" for name in names}
    return results


def write_failures(folder: Path, plan: Plan) -> None:
    """Writes failed.jsonl anew: a line for each LoRA that failed or was refused, with the reason.

    Raises:
        OutputError: it cannot be written.
    """
    lines = []
    for entry, state, record in read_outcomes(plan, folder):
        if state in ("failed", "refused"):
            line = {"lora": entry.lora, "source": entry.pair.source, "target": entry.pair.target}
            line["error"] = record.error if record else "refused by the plan"
            line["reason"] = record.reason if record else entry.refused
            lines.append(json.dumps(line) + "\n")
    if lines or (folder / FAILED).exists():
        write_text_atomically(folder / FAILED, "".join(lines))


def is_complete(folder: Path, out: str, size: int) -> bool:
    """Whether a result is where its record says, with the size that it had."""
    path = folder / out
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.glob("*.safetensors")) == size
        return path.stat().st_size == size
    except OSError:
        return False


def is_unchanged(entry: Entry) -> bool:
    """Whether the LoRA's file is as the plan saw it; one that is gone counts as unchanged."""
    size, modified = find_state(Path(entry.lora))
    return (size, modified) in ((entry.size, entry.modified), (0, 0))


def find_state(lora: Path) -> tuple[int, int]:
    """Bytes of a LoRA and when its content last changed; zeros where it cannot be reached.

    Args:
        lora: a file, or the folder of an adapter.
    """
    try:
        files = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
        states = [read_state(file) for file in files]
    except (OSError, UnsupportedFormat):
        return 0, 0
    return sum(s.size for s in states), max((s.modified for s in states), default=0)
