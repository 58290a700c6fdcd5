"""Where results may be written: never over an input, never twice to one file."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..adapters.unread import PEFT_CONFIG, PEFT_WEIGHTS
from ..errors import OutputError
from ..files.writing import check_writable
from .page.document import is_page

StrPath = str | PathLike[str]


def check_output(path: StrPath, inputs: Iterable[StrPath]) -> None:
    """Refuses an output that cannot be written, or that is an input or a folder around one.

    A PEFT folder may exist, and keeps what is not prolora's. It is exchanged as a whole, so no
    model may lie in it.

    Raises:
        OutputError: says why.
    """
    check_name(path)
    folder, inputs = Path(path), list(inputs)
    if os.path.isdir(folder):
        own = Path(os.path.realpath(folder))
        for source in (Path(os.path.realpath(source)) for source in inputs):
            if own == source or own in source.parents:
                raise OutputError(
                    f"{path}: holds the input {source}; name a folder that is for the adapter only"
                )
    check_writable(folder / PEFT_WEIGHTS if os.path.isdir(folder) else folder, inputs)


def check_name(path: StrPath) -> None:
    """Refuses an empty path, which pathlib takes for the current folder."""
    if not os.fspath(path):
        raise OutputError("the output has an empty name")


def name_output(lora: Path, format: str, appended: str = "", stem: str | None = None) -> str:
    """The name of a LoRA's result in a folder: a PEFT adapter is a folder and has no suffix.

    Every other LoRA is a .safetensors file.

    Args:
        lora: the input.
        format: of the result.
        appended: put at the end of the name, before the suffix.
        stem: the name without both; None means the LoRA's own.
    """
    # os.path answers "no" where a path cannot be looked at; the reader says why later.
    is_folder, is_peft = os.path.isdir(lora), os.path.isfile(lora / PEFT_CONFIG)
    own, suffix = (lora.name, ".safetensors") if is_folder else (lora.stem, lora.suffix)
    if format == "peft" or (format == "auto" and is_peft):
        suffix = ""
    return f"{own if stem is None else stem}{appended}{suffix}"


def check_distinct(loras: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Refuses results that overwrite each other.

    Args:
        loras: the inputs.
        outputs: the result of each.

    Raises:
        OutputError: two would be one file, on a volume that ignores case and Unicode forms too.
    """
    taken: dict[tuple[str, ...], Path] = {}
    for lora, output in zip(loras, outputs, strict=True):
        other = taken.setdefault(fold_path(Path(os.path.realpath(output))), lora)
        if other is not lora:
            raise OutputError(
                f"two inputs would become {output.name} and overwrite each other: {other} and "
                f"{lora} (some volumes ignore upper and lower case and the form of accents)"
            )


def _fold_name(name: str) -> str:
    """What volumes that ignore case and Unicode forms compare."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def check_report_path(path: StrPath) -> None:
    """Refuses a path for a report that cannot be written, or holds anything else.

    Raises:
        OutputError: says why.
    """
    check_writable(path)
    report = Path(path)
    if report.exists() and not _holds_report(report):
        raise OutputError(
            f"{path}: exists and is no report of prolora, so it is not replaced; delete it or name "
            "another file"
        )


def is_page_path(path: StrPath) -> bool:
    """Whether a report of that name is written as an HTML page."""
    return Path(path).suffix.lower() in (".html", ".htm")


def fold_path(path: Path) -> tuple[str, ...]:
    """The parts of a path as volumes compare them that ignore case and Unicode forms."""
    return tuple(_fold_name(part) for part in path.parts)


def _holds_report(file: Path) -> bool:
    """Whether a file is empty, a page of prolora, or the JSON of one transfer or of several."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(4096)
        if head[:1] not in (b"", b"{", b"["):
            return is_page(head)  # a safetensors file may be large
        content = json.loads(file.read_bytes() or b"[]")
    except (OSError, ValueError, RecursionError):
        return False
    entries = content if isinstance(content, list) else [content]
    return all(isinstance(entry, dict) and _is_report(entry) for entry in entries)


def _is_report(entry: dict[str, Any]) -> bool:
    """Whether a JSON object is the report of a transfer, or says why there is none."""
    return {"modules", "totals", "summary"} <= entry.keys() or (
        {"lora", "out", "status"} <= entry.keys()
    )
