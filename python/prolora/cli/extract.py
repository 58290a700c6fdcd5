"""`prolora extract`: the LoRA between two base models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from ..bases import open_base
from ..workflow.extract import extract as extract_lora
from ..workflow.extract_options import ExtractOptions
from .console import progress_bar
from .options import base_argument, expand_options
from .output_options import FileOutput
from .transfer import check_output_given, check_outputs, tell_made_lora


@expand_options
def extract(
    base: Annotated[str, base_argument("Base model that the LoRA is to be used with.")],
    tuned: Annotated[
        str, base_argument("The same model after training, likewise.", metavar="TUNED")
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
        out, dry_run = output.output, output.dry_run
        report = extract_lora(old, new, options, out=out, dry_run=dry_run).report
    tell_made_lora(Path(tuned), report, output, extracting.overwrite)
