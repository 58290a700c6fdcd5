"""`prolora check`: what files are, and whether they are for a base or a program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..checking.check import CheckRequest
from ..checking.check_result import Check, explain_differences
from ..errors import InvalidOption, ProLoRAError
from ..files.hub import spell_path
from .console import answer, out, progress_bar
from .exits import HANDLED, ExitCode, describe_error, find_exit_code
from .flags import JsonOption, base_option, path_argument, split_bases
from .tables import MARKS, draw_facts

MEANINGS = {
    ExitCode.DONE: "nothing speaks against using the files as asked",
    ExitCode.REFUSED: "a file cannot be read",
    ExitCode.NOT_FOR_IT: "a LoRA is not for the base or program, or in part, or of no known model",
}


def check(
    files: Annotated[
        list[Path],
        path_argument("LoRAs or base models, or hub ids; a base after LoRAs is --base."),
    ],
    base: Annotated[
        str | None, base_option("Are they for this base (or family, as sdxl)?", metavar="BASE")
    ] = None,
    source: Annotated[
        str | None, base_option("Base that the LoRAs were trained on, with --target.")
    ] = None,
    target: Annotated[
        str | None, base_option("What would a transfer to this base give? Compares weights.")
    ] = None,
    program: Annotated[
        str | None,
        typer.Option("--for", metavar="PROGRAM", help="Are they for this program, as comfyui?"),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read all numbers, too: NaN, overflows.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a file is and whether it is for a base or a program, from headers.

    With --source and --target the weights are compared, too.
    """
    records: list[dict[str, Any]] = []
    loras: dict[str, Check] = {}
    code = ExitCode.DONE
    asked: dict[str, Any] = {"program": program, "deep": deep, "source": source, "target": target}
    if base is source is target is None:
        files, bases = split_bases(files, 2)
        asked |= dict(zip(("source", "target"), bases, strict=True)) if bases[1:] else {}
        base = bases[0] if len(bases) == 1 else None
    request = CheckRequest(base, **asked, cache=None)
    for file in files:
        try:
            with progress_bar("check", request.target is not None and not as_json) as progress:
                result = request.check(file, progress)
        except HANDLED as error:
            if len(files) == 1 or isinstance(error, InvalidOption):
                raise
            text = f"✖ {describe_error(error)[0].removeprefix(f'{spell_path(file)}: ')}"
            refusal = error if isinstance(error, ProLoRAError) else ProLoRAError(str(error))
            records.append({"path": spell_path(file), "error": refusal.to_dict()})
            style, code = MARKS["✖"], find_exit_code(error)
        else:
            records.append(result.to_dict())
            loras |= {file.name: result} if result.kind == "lora" else {}
            text, style = f"{result.mark} {result.headline}", MARKS[result.mark]
            if result.reason:
                code = ExitCode.REFUSED
            code = code if result or code else ExitCode.NOT_FOR_IT
        if not as_json:
            start = f"{file.name}: " if len(files) > 1 else ""
            out.print_line(f"{start}{text}", style=style)
            if len(files) == 1:
                out.print(draw_facts(result.facts()))
    if as_json:
        answer.write(records[0] if len(records) == 1 else records)
    elif len(files) > 1:
        good = sum(record.get("ok") is True for record in records)
        out.print_line(f"{good} of {len(files)} files are as asked")
        if base is source is None and (differences := explain_differences(loras)):
            out.print_line(differences, style=MARKS["⚠"])
    raise typer.Exit(code)
