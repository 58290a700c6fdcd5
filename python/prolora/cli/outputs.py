"""Files that the commands write beside the LoRA: they replace nothing but their like."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from ..adapters.unread import PEFT_CONFIG, PEFT_WEIGHTS
from ..errors import OutputError
from ..files.writing import check_writable
from .heatmap import is_heatmap

_REPORT = re.compile(rb'\s*(\[\s*)?\{\s*"lora"')


def check_report(
    report: Path, output: Path | None, loras: Iterable[Path], bases: Iterable[Path]
) -> None:
    """Refuses a report path before any work is done for it.

    Args:
        report: path of the report.
        output: the file or folder that the LoRAs are written to; None in a dry run.
        loras: the LoRAs to move.
        bases: files of the bases.

    Raises:
        OutputError: the report cannot be written, or would replace an input, a LoRA of this run,
            or a file that is no report.
    """
    loras = list(loras)
    check_writable(report, [*loras, *bases])
    taken = set(map(normalise_path, _list_outputs(output, loras))) if output else set()
    if normalise_path(report) in taken:
        raise OutputError(f"{report}: the report would replace the LoRA; give it another name")
    _refuse_other_files(report, "report", lambda head: _REPORT.match(head) is not None)


def check_plot(plot: Path, bases: Iterable[Path]) -> None:
    """Refuses the path of a picture before any work is done for it.

    Raises:
        OutputError: it cannot be written, or would replace a base or a file that is no picture of
            a comparison.
    """
    check_writable(plot, bases)
    _refuse_other_files(plot, "picture of a comparison", is_heatmap)


def normalise_path(path: Path) -> str:
    """The same text for all spellings of a path that some file system takes for one.

    Links are resolved; upper and lower case and the forms of Unicode are not told apart.
    """
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def _list_outputs(output: Path, loras: Iterable[Path]) -> list[Path]:
    """Every path that a LoRA may be written to, in any format."""
    names = {name for lora in loras for name in (lora.name, lora.stem, f"{lora.stem}.safetensors")}
    names |= {f"{lora.name}.safetensors" for lora in loras}
    paths = [output, *(output / name for name in names)]
    return paths + [path / part for path in paths for part in (PEFT_CONFIG, PEFT_WEIGHTS)]


def _refuse_other_files(path: Path, kind: str, is_kind: Callable[[bytes], bool]) -> None:
    """Refuses to replace a file that is there and is something else."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: exists and cannot be read: {error.strerror}") from error
    if head and not is_kind(head):
        raise OutputError(f"{path}: exists and is no {kind}; give the {kind} another name")
