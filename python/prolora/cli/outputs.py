"""Files that the commands write beside the LoRA."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..adapters.adapter_folder import PEFT_CONFIG, PEFT_WEIGHTS
from ..bases.experts import ExpertPair
from ..errors import OutputError, join_words
from ..files.store import check_free
from ..reports.outcome import is_report_of
from ..verbs.output_paths import is_peft_folder, name_output, resolve_path

# Ends of other kinds of LoRA files, which people write out of habit.
_OTHER_ENDS = (".ckpt", ".pt", ".pth", ".bin", ".safetensor", ".st", ".gguf")


def check_report(
    report: Path,
    outputs: Iterable[Path],
    loras: Iterable[Path],
    bases: Iterable[Path],
    overwrite: bool,
) -> None:
    """Refuses a report path before any work is done for it.

    `outputs` are the files and PEFT folders that this run writes. A report of results that are all
    there already, which a run that was killed at its very end has left, is no obstacle.
    """
    taken = [file for path in outputs for file in (path, path / PEFT_CONFIG, path / PEFT_WEIGHTS)]
    if resolve_path(report) in map(resolve_path, taken):
        raise OutputError(f"{report}: the report would replace the LoRA; give it another name")
    if not is_report_of(report, taken):
        check_free(report, [*loras, *bases], overwrite=overwrite)


def list_outputs(
    output: Path | None, loras: Iterable[Path], pairs: Sequence[ExpertPair], format: str
) -> list[Path]:
    """Lists every path for the LoRAs' outputs; empty in a dry run."""
    if output is None:
        return []
    ends = ["", *(f"_{pair.expert}" for pair in pairs if pair.expert)]
    files = [append_to_name(output, end) for end in ends]
    return [*files, *(output / name_output(lora, format, end) for lora in loras for end in ends)]


def place_output(output: Path | None, made_of: Path, format: str | None) -> Path | None:
    """Returns where one LoRA is written: in a folder that exists under the name it came with."""
    if output is None or not is_folder_of_loras(output, format):
        return output
    return output / name_output(made_of, format or "auto")


def is_folder_of_loras(output: Path, format: str | None) -> bool:
    """Returns whether LoRAs are written into a path; a PEFT adapter there is replaced instead."""
    return output.is_dir() and format != "peft" and not is_peft_folder(output)


def append_to_name(path: Path, appended: str) -> Path:
    """Appends to a path's name, before the suffix of a LoRA's file."""
    if path.suffix != ".safetensors":
        return path.parent / f"{path.name}{appended}" if appended else path
    return path.with_name(f"{path.stem}{appended}{path.suffix}")


def check_lora_name(path: Path, is_folder: bool) -> None:
    """Refuses a name that programs would not take for a LoRA.

    `path` is where one LoRA is written to.

    Raises:
        OutputError: a file's name does not end in .safetensors.
    """
    if not (is_folder or path.is_dir() or path.suffix.lower() == ".safetensors"):
        name = path.with_name(f"{path.stem if path.suffix in _OTHER_ENDS else path.name}")
        raise OutputError(
            f"{path}: programs read a LoRA from a file that ends in .safetensors: write "
            f"{name}.safetensors; or make a folder of that name first, to keep the LoRA's name"
        )


def read_command() -> str:
    """Returns the command line as a shell takes it, for published pages.

    Folders of files are private and left out.
    """
    words = []
    for word in sys.argv[1:]:
        option, equals, path = word.rpartition("=") if word.startswith("--") else ("", "", word)
        is_path = os.path.exists(path) or path.startswith((".", "~")) or os.path.isabs(path)
        name = (is_path and Path(path).name) or path  # a hub id is no path
        words.append(f"{option}{equals}{name}")
    return join_words(["prolora", *words])
