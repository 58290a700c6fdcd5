"""results.jsonl: one line a number, written the moment that it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]
# What every line has; `value` is null where there is an `error` instead of a number.
FIELDS = {
    "call": str,  # correct, anchors, ours or why
    "step": str,  # what is run again as a whole if it was cut off
    "name": str,
    "value": float,
    "unit": str,
    "case": str,
    "repeats": int,  # `value` is the median of so many
    "card": str,
    "date": str,
    "commit": str,
    "versions": str,  # of torch, cuSOLVER and the driver
    "sources": str,  # hash of what was built; a commit that changes none of it changes no result
    "command": str,
}
# What some lines have beside that.
FURTHER = {"limit": float, "scaled": float, "note": str, "error": str, "dry": bool}
FINISHED = "finished"
"""The name of the line that ends a step; its value is the seconds that the step took."""


def check_line(line: Line) -> None:
    """Raises ValueError where a line is not as FIELDS and FURTHER say."""
    missing, unknown = FIELDS.keys() - line.keys(), line.keys() - FIELDS.keys() - FURTHER.keys()
    if missing or unknown:
        raise ValueError(f"missing {sorted(missing)}, unknown {sorted(unknown)} in {line}")
    for name, value in line.items():
        wanted = (FIELDS | FURTHER)[name]
        if name == "value" and value is None and "error" in line:
            continue
        if not isinstance(value, (int, float) if wanted is float else wanted):
            raise ValueError(f"{name} must be {wanted.__name__}, not {value!r}, in {line}")


def append_line(path: Path, line: Line) -> None:
    """Appends a line, on the disk before this returns."""
    check_line(line)
    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            # A process that was killed may have left half a line.
            text = text if file.read(1) == b"\n" else f"\n{text}"
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(paths: Iterable[Path]) -> list[Line]:
    """The lines of several files; a last line that was cut off is left out.

    A file whose name ends in .json is one array, as `pack_results` writes it.
    """
    lines = []
    for path in paths:
        if path.suffix == ".json":
            packed = json.loads(path.read_text("utf-8"))
            for line in packed:
                check_line(line)
            lines.extend(packed)
        elif path.exists():
            for text in path.read_text("utf-8").splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    continue
                check_line(lines[-1])
    return lines


def finished_steps(lines: Iterable[Line], call: str, card: str, sources: str) -> set[str]:
    """The steps of a call that are done, on this card and with these sources."""
    wanted = (call, card, sources, FINISHED)
    return {
        line["step"]
        for line in lines
        if (line["call"], line["card"], line["sources"], line["name"]) == wanted
        and "error" not in line
    }


def pack_results(out: Path) -> Path | None:
    """Writes all results of a folder as one JSON array, out/gpu.json; None if there are none."""
    lines = read_lines([out / "results.jsonl"])
    if not lines:
        return None
    file = out / "gpu.json"
    file.write_text(json.dumps(lines, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return file
