"""`prolora extract`: the LoRA between two base models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from ..bases import open_base
from ..errors import InvalidOption
from ..making.extract import extract as extract_lora
from ..making.extract_options import ExtractOptions
from .console import progress_bar
from .flags import base_argument, base_option
from .options import OutputFlags, expand_options
from .outputs import place_output
from .transfer import check_output_given, check_outputs, print_made_lora


@expand_options("max_memory", "card")
def extract(
    extracting: ExtractOptions,
    output: OutputFlags,
    first: Annotated[str | None, base_argument("The base model, in place of --base.")] = None,
    second: Annotated[
        str | None, base_argument("The model after training, in place of --tuned.", metavar="TUNED")
    ] = None,
    base: Annotated[str | None, base_option("Base model that the LoRA is to be used with.")] = None,
    tuned: Annotated[
        str | None, base_option("The same model after training, likewise.", metavar="TUNED")
    ] = None,
) -> None:
    """Write the LoRA between two base models: a fine-tune's, or a few-step sibling's."""
    check_output_given(output)
    base, tuned = base or first, tuned or (second if base is None else first)
    if base is None or tuned is None:
        raise InvalidOption("Missing argument 'BASE': give both models, or --base and --tuned")
    old, new = open_base(base), open_base(tuned)
    output.output = place_output(output.output, Path(tuned), extracting.format)
    check_outputs([Path(tuned)], output, extracting, [*old.files, *new.files])
    with progress_bar("extract", output.show_tables) as progress:
        options = replace(extracting, progress=progress)
        out, dry_run = output.output, output.dry_run
        report = extract_lora(old, new, options, out=out, dry_run=dry_run).report
    print_made_lora(Path(tuned), report, output, extracting.overwrite)
