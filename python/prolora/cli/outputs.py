"""Files that the commands write beside the LoRA: they replace nothing but their like."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..adapters.unread import PEFT_CONFIG, PEFT_WEIGHTS
from ..errors import OutputError
from ..files.writing import check_writable
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


def list_outputs(output: Path | None, loras: Iterable[Path], format: str) -> list[Path]:
    """Every path that the LoRAs may be written to; none in a dry run."""
    if output is None:
        return []
    return [output, *(output / name_output(lora, format) for lora in loras)]


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


def _resolve_path(path: Path) -> tuple[str, ...]:
    """The same for all spellings of a path that some volume takes for one; links are followed."""
    return fold_path(Path(os.path.realpath(path)))
