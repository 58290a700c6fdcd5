"""`prolora extract` and `prolora convert`: LoRAs that are made without being moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer

from ..bases import open_base
from ..workflow.convert import convert, convert_file
from ..workflow.convert_options import ConvertOptions
from ..workflow.extract import extract_file, plan_extraction
from ..workflow.extract_options import ExtractOptions
from ..workflow.outcome import Outcome
from ..workflow.report import Report
from .console import progress_bar
from .options import expand_options, parse_base, parse_path
from .output_options import FileOutput
from .transfer import check_output_given, check_outputs, tell_outcomes


@expand_options
def make_extraction(
    base: Annotated[
        str,
        typer.Argument(
            parser=parse_base, metavar="BASE", help="Base model that the LoRA is to be used with."
        ),
    ],
    tuned: Annotated[
        str,
        typer.Argument(
            parser=parse_base, metavar="TUNED", help="The same model after training, likewise."
        ),
    ],
    extracting: ExtractOptions,
    output: FileOutput,
) -> None:
    """Write the LoRA between two base models: a fine-tune's, or a few-step sibling's."""
    check_output_given(output)
    old, new = open_base(base), open_base(tuned)
    check_outputs([Path(tuned)], output, extracting, [*old.files, *new.files])
    with progress_bar("extract", output.show_tables) as progress:
        options = replace(extracting, progress=progress)
        if output.dry_run:
            report = plan_extraction(old, new, options)
        else:
            report = extract_file(old, new, cast(Path, output.output), options)
    _tell(Path(tuned), report, output)


@expand_options
def make_conversion(
    lora: Annotated[
        Path, typer.Argument(parser=parse_path, metavar="LORA", help="LoRA file or PEFT folder.")
    ],
    converting: ConvertOptions,
    output: FileOutput,
    base: Annotated[
        str | None,
        typer.Argument(
            parser=parse_base,
            metavar="BASE",
            help="Base model it was trained on; needed for DoRA, GLoRA and OFT.",
        ),
    ] = None,
) -> None:
    """Write a LoRA in another format, precision, rank or kind, for the base that it has."""
    check_output_given(output)
    model = None if base is None else open_base(base)
    check_outputs([lora], output, converting, model.files if model else [])
    with progress_bar("convert", output.show_tables) as progress:
        options = replace(converting, progress=progress)
        if output.dry_run:
            report = replace(convert(lora, model, options).report, dry_run=True)
        else:
            report = convert_file(lora, cast(Path, output.output), model, options)
    _tell(lora, report, output)


def _tell(made_of: Path, report: Report, output: FileOutput) -> None:
    out = made_of if output.output is None else output.output
    outcome = Outcome(made_of, out, report, planned=output.dry_run)
    tell_outcomes([outcome], output, None, False, None)
