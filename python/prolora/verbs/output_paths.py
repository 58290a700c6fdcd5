"""Where results may be written: never over an input, never twice to one file."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path

from ..adapters.adapter_folder import PEFT_CONFIG
from ..adapters.hub_adapters import look_for_adapter
from ..errors import OutputError
from ..files.hub import WEIGHT_FILES, find_hub_id, is_broken_id, spell_path
from ..files.store import check_free

StrPath = str | PathLike[str]


def check_output(
    path: StrPath, inputs: Sequence[StrPath], overwrite: bool = False, format: str | None = None
) -> None:
    """Refuses an output that exists, is unwritable, or overlaps an input.

    `inputs` are files or folders, the LoRA first; `format` is the result's, where "auto" and None
    mean the LoRA's.

    Raises:
        OutputExists: something has that name.
        OutputError: says why.
    """
    check_name(path)
    as_lora = format in (None, "auto") and inputs and os.path.isfile(Path(inputs[0], PEFT_CONFIG))
    if (format == "peft" or as_lora) and Path(path).suffix.lower() in WEIGHT_FILES:
        raise OutputError(
            f"{path}: is the name of a file, and PEFT's format is a folder; name a folder, or "
            'choose another format ("diffusers", "comfy", "kohya")'
        )
    check_free(path, inputs, overwrite=overwrite, folder=os.path.isdir(path))


def check_name(path: StrPath) -> None:
    """Refuses an empty path, which means the current folder, and a NUL in one."""
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise OutputError(f"the output has {'a NUL in its' if path else 'an empty'} name")


def check_results_folder(folder: StrPath, count: int) -> None:
    """Refuses a results folder without a name, or with a file's.

    An existing folder may have any name; `count` is the number of LoRAs.

    Raises:
        OutputError: says why.
    """
    check_name(folder)
    named = Path(folder)
    if count > 1 and named.suffix.lower() in WEIGHT_FILES and not os.path.isdir(named):
        raise OutputError(
            f"several LoRAs need a folder; {folder} is the name of a file: write to "
            f"{named.with_suffix('')} instead"
        )


def name_output(lora: Path, format: str, appended: str = "", stem: str | None = None) -> str:
    """Returns the name of a LoRA's result in a folder.

    A PEFT adapter is a folder and has no suffix; every other LoRA is a .safetensors file.

    `appended` is put at the end of the name, before the suffix; `stem` is the name without both,
    None for the LoRA's own.
    """
    id_ = None if is_broken_id(lora) else find_hub_id(lora)  # counts by its last part
    named = Path(id_.name) if id_ else lora
    own, suffix = named.stem, named.suffix
    # os.path answers "no" where a path cannot be looked at; the reader says why later.
    if os.path.isdir(lora) or (id_ and suffix.lower() not in WEIGHT_FILES):
        own, suffix = named.name, ".safetensors"
    if format == "peft" or (format == "auto" and is_peft_folder(lora)):
        suffix = ""
    return f"{own if stem is None else stem}{appended}{suffix}"


def is_peft_folder(lora: Path) -> bool:
    """Recognises a LoRA as PEFT saves it; False for unreadable paths."""
    return os.path.isfile(look_for_adapter(lora) / PEFT_CONFIG)


def check_distinct(loras: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Refuses results that overwrite each other, or another LoRA's file.

    What only looks like an id on the hub has no result.

    Raises:
        OutputError: two would be one file, on a volume that ignores case and Unicode forms too.
    """
    inputs = {resolve_path(lora): lora for lora in loras if "\0" not in os.fspath(lora)}
    taken: dict[tuple[str, ...], Path] = {}
    for lora, output in zip(loras, outputs, strict=True):
        if is_broken_id(lora) or "\0" in os.fspath(output):  # its reader says so
            continue
        place = resolve_path(output)
        if inputs.get(place, lora) is not lora:
            raise OutputError(f"{output} is the input {inputs[place]}; choose another folder")
        other = taken.setdefault(place, lora)
        if other is not lora:
            raise OutputError(
                f"two inputs would become {output.name} and overwrite each other: "
                f"{spell_path(other)} and {spell_path(lora)} (some volumes ignore upper "
                "and lower case and the form of accents)"
            )


def resolve_path(path: Path) -> tuple[str, ...]:
    """Returns the parts of a path, equal for all its spellings on any volume.

    Links are followed; case and Unicode forms are folded, as some volumes do.
    """
    fold = partial(unicodedata.normalize, "NFC")
    return tuple(fold(fold(part).casefold()) for part in Path(os.path.realpath(path)).parts)


def make_folders(folders: Iterable[Path]) -> None:
    """Makes the folders of the results.

    Raises:
        OutputError: one cannot be made.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise OutputError(f"{folder}: the output folder cannot be made: {error}") from error
