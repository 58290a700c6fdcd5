"""`prolora convert`: a LoRA in another format, precision, rank or kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from ..bases import open_base
from ..making.convert import ConvertOptions
from ..making.convert import convert as convert_lora
from .console import progress_bar
from .flags import base_argument, base_option, path_argument
from .options import OutputFlags, expand_options
from .outputs import place_output
from .transfer import check_output_given, check_outputs, print_made_lora


@expand_options("dry_run", "card")
def convert(
    lora: Annotated[Path, path_argument("LoRA file, PEFT folder or hub id.", metavar="LORA")],
    converting: ConvertOptions,
    output: OutputFlags,
    place: Annotated[str | None, base_argument("The base model, in place of --base.")] = None,
    base: Annotated[
        str | None, base_option("Base model it was trained on; needed for DoRA, GLoRA and OFT.")
    ] = None,
) -> None:
    """Write a LoRA in another format, precision, rank or kind, for the base that it has."""
    check_output_given(output)
    base = base or place
    model = None if base is None else open_base(base)
    output.output = place_output(output.output, lora, converting.format)
    check_outputs([lora], output, converting, model.files if model else [])
    with progress_bar("convert", output.show_tables) as progress:
        options = replace(converting, progress=progress)
        report = convert_lora(lora, model, options, out=output.output).report
    print_made_lora(lora, report, output, converting.overwrite)
