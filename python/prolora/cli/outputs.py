"""Files that the commands write beside the LoRA: they replace nothing but their like."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..adapters.unread import PEFT_CONFIG, PEFT_WEIGHTS
from ..bases import Base
from ..bases.experts import ExpertPair
from ..comparison.module_map import Match, find_partners
from ..errors import OutputError, UnsupportedFormat
from ..files.jsontext import read_json_object
from ..files.writing import check_writable, write_text_atomically
from ..workflow.output_paths import check_report_path, fold_path, name_output
from .heatmap import is_heatmap


def check_report(
    report: Path, outputs: Iterable[Path], loras: Iterable[Path], bases: Iterable[Path]
) -> None:
    """Refuses a report path before any work is done for it.

    Args:
        report: path of the report.
        outputs: the files and PEFT folders that this run writes.
        loras: the LoRAs to move.
        bases: files of the bases.

    Raises:
        OutputError: the report cannot be written, or would replace an input, a LoRA of this run,
            or a file that is no report.
    """
    check_writable(report, [*loras, *bases])
    taken = [file for path in outputs for file in (path, path / PEFT_CONFIG, path / PEFT_WEIGHTS)]
    if _resolve_path(report) in map(_resolve_path, taken):
        raise OutputError(f"{report}: the report would replace the LoRA; give it another name")
    check_report_path(report)


def list_outputs(
    output: Path | None, loras: Iterable[Path], pairs: Sequence[ExpertPair], format: str
) -> list[Path]:
    """Every path that the LoRAs may be written to; none in a dry run."""
    if output is None:
        return []
    ends = ["", *(f"_{pair.expert}" for pair in pairs if pair.expert)]
    files = [append_to_name(output, end) for end in ends]
    return [*files, *(output / name_output(lora, format, end) for lora in loras for end in ends)]


def append_to_name(path: Path, appended: str) -> Path:
    """A path with something at the end of its name, before the suffix of a LoRA's file."""
    if path.suffix != ".safetensors":
        return path.parent / f"{path.name}{appended}" if appended else path
    return path.with_name(f"{path.stem}{appended}{path.suffix}")


def check_plot(plot: Path, bases: Iterable[Path]) -> None:
    """Refuses the path of a picture before any work is done for it.

    Raises:
        OutputError: it cannot be written, or would replace a base or a file that is no picture of
            a comparison.
    """
    check_writable(plot, bases)
    try:
        with plot.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{plot}: exists and cannot be read: {error.strerror}") from error
    if head and not is_heatmap(head):
        raise OutputError(
            f"{plot}: exists and is no picture of a comparison; give the picture another name"
        )


def check_match_file(path: Path, inputs: Iterable[Path]) -> None:
    """Refuses the path of a map of modules before any work is done for it.

    Raises:
        OutputError: it cannot be written, or would replace an input, an output of this run, or a
            file that is no such map.
    """
    inputs = list(inputs)
    check_writable(path, inputs)
    if _resolve_path(path) in map(_resolve_path, inputs):
        raise OutputError(f"{path}: the map would replace another file of this run")
    if not path.exists():
        return
    try:
        is_map = all(isinstance(name, str) for name in read_json_object(path).values())
    except UnsupportedFormat:
        is_map = False
    if not is_map:
        raise OutputError(f"{path}: exists and is no map of modules; give the map another name")


def save_match(path: Path, source: Base, target: Base, match: Match) -> None:
    """Writes {target module: source module}, which --match takes, in the target's order."""
    table, _ = find_partners(source, target, match)
    ordered = {name: table[name] for name in target.shapes if name in table}
    write_text_atomically(path, json.dumps(ordered, indent=1) + "\n")


def _resolve_path(path: Path) -> tuple[str, ...]:
    """The same for all spellings of a path that some volume takes for one; links are followed."""
    return fold_path(Path(os.path.realpath(path)))
