"""`prolora check`: whether LoRAs are for a base, a line each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ProLoRAError
from ..files.hub import spell_path
from ..workflow.check import check as check_lora
from ..workflow.check import open_checked
from .console import answer, out
from .exits import ExitCode, describe_error
from .options import JsonOption, base_argument
from .tables import MARKS
from .transfer import LoraArguments

MEANINGS = {
    ExitCode.DONE: "every LoRA is for the base",
    ExitCode.REFUSED: "a file cannot be read",
    ExitCode.LOW_COVERAGE: "a LoRA is for another model, or has modules that the base lacks",
}


def check(
    loras: LoraArguments,
    base: Annotated[str, base_argument("Base model: file, folder, hub id.")],
    as_json: JsonOption = False,
) -> None:
    """Say whether a LoRA is for a base model, from headers alone."""
    model, records, code = open_checked(base), [], ExitCode.DONE
    for lora in loras:
        start = f"{lora.name}: " if len(loras) > 1 else ""
        try:
            found = check_lora(lora, model)
        except ProLoRAError as error:
            if len(loras) == 1:
                raise
            code, text, style = ExitCode.REFUSED, describe_error(error)[0], MARKS["✖"]
            text += explain_order(lora)
            records.append({"lora": spell_path(lora), "error": error.to_dict()})
        else:
            code = code if found or code else ExitCode.LOW_COVERAGE
            records.append(found.to_dict())
            text, style = str(found), MARKS[found.mark]
        if not as_json:
            out.print_line(f"{start}{text}", style=style)
    if as_json:
        answer.give(records[0] if len(records) == 1 else records)
    raise typer.Exit(code)


def explain_order(lora: Path) -> str:
    """The end of a message about what was given as a LoRA, where it is a base."""
    try:
        is_base = lora.exists() and bool(open_checked(str(lora)).shapes)
    except ProLoRAError:
        is_base = False
    return "; the last argument is the base, and each one before it a LoRA" if is_base else ""
