"""`prolora fit`: a LoRA fitted to the running models of two pipelines."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, cast

import typer

from ..bases import Base, open_base
from ..bases.base import Progress
from ..fitting.fit import fit as fit_lora
from ..fitting.fit import fit_many
from ..fitting.settings import SHOWN, FitOptions, read_prompts
from ..reports.outcome import Outcome
from ..reports.report import is_page_path
from ..verbs.result import Transfer
from .console import err, progress_bar
from .flags import base_option
from .options import (
    BriefCommand,
    HelpAllOption,
    OutputFlags,
    expand_options,
    find_cache,
    take_bases,
)
from .outputs import is_folder_of_loras
from .transfer import LoraArguments, check_output_given, check_outputs, plan_each, print_outcomes


class FitCommand(BriefCommand):
    """`prolora fit`, whose short help has what most people need of it."""

    first = "source target prompts images size rank max_vram output report help_all"


@dataclass
class Pipelines:
    """The two pipelines."""

    source: Annotated[
        str | None,
        base_option("Folder of the diffusers pipeline the LoRA was trained on.", metavar="FOLDER"),
    ] = None
    target: Annotated[
        str | None, base_option("Folder of the pipeline to fit it to.", metavar="FOLDER")
    ] = None

    def open(self, loras: list[Path], alone: bool) -> tuple[list[Path], Base | None, Base]:
        """Opens both, or with `alone` the target; returns (LoRAs, source, target)."""
        if alone and self.target and not self.source:
            return loras, None, open_base(self.target)
        loras, (source, target) = take_bases(loras, self.source, self.target)
        return loras, open_base(source), open_base(target)


@expand_options()
def fit(
    loras: LoraArguments,
    bases: Pipelines,
    fitting: FitOptions,
    output: OutputFlags,
    prompts: Annotated[
        list[str],
        typer.Option(
            "--prompts",
            "--prompt",
            metavar="TEXT|FILE",
            help="Prompt to sample, or a text file of them, one a line; may be repeated.",
            rich_help_panel="Sampling",
        ),
    ] = [],  # noqa: B006 (typer wants a list)
    help_all: HelpAllOption = False,
) -> None:
    """Fit a LoRA to a running model, where weights alone do not move it."""
    loras, source, target = bases.open(loras, fitting.pictures is not None)
    check_output_given(output, loras)
    card = check_outputs(loras, output, fitting, [*(source or target).files, *target.files])
    options = replace(
        find_cache(fitting, takes_default=not output.dry_run),
        prompts=tuple(line for text in prompts for line in read_prompt(text)),
        shown_prompts=SHOWN if output.report and is_page_path(output.report) else 0,
    )
    run = plan_fits if output.dry_run else fit_loras
    outcomes = run(loras, source, target, output, options)
    print_outcomes(outcomes, output, card, fitting.overwrite)


def read_prompt(text: str) -> tuple[str, ...]:
    """Reads the lines of a file of that name, or takes the text itself."""
    return read_prompts(text) if os.path.isfile(text) else (text,)


def plan_fits(
    loras: list[Path], source: Base | None, target: Base, output: OutputFlags, options: FitOptions
) -> list[Outcome]:
    """Plans each fit."""
    options_of_file = options.for_file()

    def plan(i: int, _: Path, __: Progress | None) -> Transfer:
        return fit_lora(loras[i], source, target, options_of_file, dry_run=True)

    return plan_each(loras, loras, plan, output)


def fit_loras(
    loras: list[Path], source: Base | None, target: Base, output: OutputFlags, options: FitOptions
) -> list[Outcome]:
    """Fits one LoRA into a file, or several into a folder, one after the other."""
    path = cast(Path, output.output)
    with progress_bar("fit", output.show_tables, timed=False) as progress:
        options = replace(options, progress=announce_first(progress, output.show_tables))
        if len(loras) > 1 or is_folder_of_loras(path, options.format):
            # The page of several has a row for each, and no images.
            if len(loras) > 1:
                options = replace(options, shown_prompts=0)
            return fit_many(loras, source, target, path, options)
        report = fit_lora(loras[0], source, target, options, out=path).report
        return [Outcome(loras[0], path, report, kept=report.dry_run)]


def announce_first(progress: Progress, shown: bool) -> Progress:
    """Wraps a callback so that its first name, the work ahead, is printed, too."""
    announced: list[str] = []

    def update(done: int, total: int, name: str) -> None:
        if announced or not shown:
            return progress(done, total, name)
        announced.append(name)
        err.print_note(name)

    return update
