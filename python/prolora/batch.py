"""Many LoRAs of one base: each weight is factorised once, and one bad file stops no other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .adapters.source import PEFT_CONFIG
from .bases import open_base
from .errors import OutputError, ProLoRAError
from .matching import resolve
from .options import Progress
from .report import Report
from .transfer import transfer_file


@dataclass(frozen=True)
class Outcome:
    """What became of one LoRA: a report, or the error that says why there is none.

    Attributes:
        lora: the input.
        out: where the result is, or would have been.
        report: None if it failed.
        error: None if it did not.
    """

    lora: Path
    out: Path
    report: Report | None = None
    error: ProLoRAError | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report, or the error's name and message, ready for JSON."""
        found: dict[str, Any] = {"lora": str(self.lora), "out": str(self.out)}
        if self.error:
            found["error"] = {"type": type(self.error).__name__, "message": str(self.error)}
        return found | (self.report.to_dict() if self.report else {})


def transfer_many(
    loras: Iterable[str | PathLike[str]],
    source: Any,
    target: Any,
    folder: str | PathLike[str],
    *,
    cache: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Outcome]:
    """Moves LoRAs into a folder, under the names they have (with the suffix the format needs).

    Args:
        loras: files or PEFT folders.
        source: base they were trained on, as `transfer` takes it.
        target: base they shall move to.
        folder: made if it does not exist.
        cache: folder that keeps subspaces; None keeps them for this call only, in a temporary one.
        progress: called as progress(done, total, "LoRA: module") for the LoRA at work.
        **options: as `transfer_file` takes them.

    Returns:
        An outcome for each LoRA, in order. A LoRA that is refused does not stop the others.

    Raises:
        OutputError: the folder cannot be made, or two inputs would have one output.
        ProLoRAError: a base that cannot be opened, or two that cannot be matched by similarity.
    """
    inputs, folder = [Path(lora) for lora in loras], Path(folder)
    names = [_output_name(lora, options.get("format", "auto")) for lora in inputs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OutputError(f"two inputs would become {twice[0]} and overwrite each other")
    source, target = open_base(source), open_base(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the output folder cannot be made: {error}") from error
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="prolora-") as temporary:
        options["match"] = resolve(
            options.get("match", "name"), source, target,
            cache=cache or temporary, device=options.get("device"), progress=progress,
        )  # fmt: skip
        for lora in inputs:
            out = folder / _output_name(lora, options.get("format", "auto"))
            try:
                report = transfer_file(
                    lora, source, target, out, cache=cache or temporary,
                    progress=_of(lora, progress), **options,
                )  # fmt: skip
                outcome = Outcome(lora, out, report=report)
            except ProLoRAError as error:
                outcome = Outcome(lora, out, error=error)
            outcomes.append(outcome)
    return outcomes


def _output_name(lora: Path, format: str) -> str:
    """A PEFT adapter is a folder and has no suffix; every other LoRA is a .safetensors file."""
    comes_as_peft = (lora / PEFT_CONFIG).is_file()
    if format == "peft" or (format == "auto" and comes_as_peft):
        return lora.name if lora.is_dir() else lora.stem
    return f"{lora.name}.safetensors" if lora.is_dir() else lora.name


def _of(lora: Path, progress: Progress | None) -> Progress | None:
    """The caller's callback, told which LoRA is at work."""
    if progress is None:
        return None
    return lambda done, total, name: progress(done, total, f"{lora.stem}: {name}")
