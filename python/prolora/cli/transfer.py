"""`prolora transfer`: what it asks of the library, and its result for people."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer

from ..adapters.left_out import UNKNOWN_UPDATE
from ..adapters.unread import PEFT_CONFIG
from ..bases.experts import ExpertPair, Experts, choose_pairs, pair_experts
from ..comparison.block_matching import resolve_match
from ..comparison.module_map import Match
from ..errors import OutputError, ProLoRAError, name_options
from ..files.ownership import mark_json
from ..files.writing import write_text_atomically
from ..workflow.batch import transfer_many
from ..workflow.card import place_card, write_card
from ..workflow.dry_run import plan_report
from ..workflow.inspection import inspect
from ..workflow.options import FormatLike, TransferOptions
from ..workflow.outcomes_page import render_outcomes, tabulate_outcomes
from ..workflow.output_paths import check_beside, is_page_path
from ..workflow.report import Outcome, Report
from ..workflow.transfer import transfer_file
from .basis import show_cache
from .console import err, out, progress_bar
from .exits import IncompleteResult
from .options import (
    ExpertBases,
    HelpAllOption,
    Resources,
    expand_options,
    parse_path,
    write_flag,
)
from .outputs import append_to_name, check_lora_name, check_report, list_outputs
from .tables import draw_table, failure_lines, show_tables
from .transfer_options import OutputOptions, ProbeOptions

STDOUT = Path("-")
"""What stands for standard output in the place of a file."""

LoraArguments = Annotated[
    list[Path],
    typer.Argument(parser=parse_path, metavar="LORA", help="LoRA files or PEFT folders."),
]


@expand_options
def transfer(
    loras: LoraArguments,
    bases: ExpertBases,
    moving: TransferOptions,
    output: OutputOptions,
    resources: Resources,
    probing: ProbeOptions,
    help_all: HelpAllOption = False,
) -> None:
    """Write the LoRA that belongs on another base model."""
    if output.output is None and not output.dry_run:
        raise OutputError("-o OUT is missing: where should the new LoRA be written?")
    resources.check_device()
    source, target = bases.open()
    pairs = pair_experts(source, target)
    outputs = list_outputs(output.output, loras, pairs, moving.format or "auto")
    files = [file for base in (*source.values(), *target.values()) for file in base.files]
    if output.output is not None and len(loras) == 1:
        check_lora_name(output.output, writes_folder(loras, moving.format))
    if output.report not in (None, STDOUT):
        check_report(output.report, outputs, loras, files, moving.overwrite)
    card = find_card(loras, output, moving.format)
    if card is not None:
        check_beside(card, "card", overwrite=moving.overwrite)
    options = replace(
        moving,
        probe=probing.to_probing(moving),
        # A dry run makes no cache folder.
        cache=resources.cache if output.dry_run else resources.find_cache(),
        device=resources.device,
        max_memory=resources.max_bytes,
    )
    run = plan_all if output.dry_run else move_loras
    outcomes = run(loras, source, target, output, options)
    if output.show_tables:
        show_outcomes(outcomes, output.modules)
        if not output.dry_run and any(used_subspaces(outcome) for outcome in outcomes):
            show_cache(cast("Path | None", options.cache))
    elif len(outcomes) > 1:
        for line in failure_lines(outcomes):
            err.print_line(line, style="red")
    write_outcomes(outcomes, output)
    if card is not None:
        write_card(card, outcomes, read_command(), moving.overwrite)
    if output.show_tables:
        for path in (output.report, card):
            if path not in (None, STDOUT) and path.exists():
                out.print_line(f"wrote {path}")
    check_outcomes(outcomes)


def plan_all(
    loras: list[Path],
    source: Experts,
    target: Experts,
    output: OutputOptions,
    options: TransferOptions,
) -> list[Outcome]:
    """What would become of each LoRA; blocks are matched once for all.

    One of several that is refused does not stop the others.
    """
    pairs = pair_experts(source, target)
    moves = [(lora, *chosen) for lora in loras for chosen in choose_pairs(lora, pairs)]
    matches = [options.match] * len(pairs)
    outcomes = []
    with progress_bar("match", output.show_tables) as progress:
        options = replace(options.for_file(), progress=progress)
        if len(loras) > 1:
            matches = [match_bases(pair, options) for pair in pairs]
        for lora, pair, appended in moves:
            asked = replace(options, match=matches[pairs.index(pair)])
            outcome = Outcome(lora, append_to_name(lora, appended), planned=True)
            try:
                report = plan_report(lora, pair.source, pair.target, asked)
                outcomes.append(replace(outcome, report=report))
            except ProLoRAError as error:
                if len(moves) == 1:
                    raise
                outcomes.append(replace(outcome, error=error))
    return outcomes


def match_bases(pair: ExpertPair, options: TransferOptions) -> Match:
    """The match that the options ask for, with blocks matched where that needs weights."""
    return resolve_match(
        options.match,
        pair.source,
        pair.target,
        cache=options.cache,
        device=options.device,
        max_memory=options.max_memory,
        progress=options.progress,
    )


def move_loras(
    loras: list[Path],
    source: Experts,
    target: Experts,
    output: OutputOptions,
    options: TransferOptions,
) -> list[Outcome]:
    """Moves one LoRA into a file (or one for each expert), or all of them into a folder."""
    path, outcomes = cast(Path, output.output), []
    with progress_bar("transfer", output.show_tables) as progress:
        options = replace(options, progress=progress)
        if len(loras) > 1 or (path.is_dir() and options.format != "peft"):
            return transfer_many(loras, source, target, path, options, redo=output.redo)
        for pair, appended in choose_pairs(loras[0], pair_experts(source, target)):
            out = append_to_name(path, appended)
            report = transfer_file(loras[0], pair.source, pair.target, out, options)
            outcomes.append(Outcome(loras[0], out, report))
    return outcomes


def write_outcomes(outcomes: list[Outcome], output: OutputOptions) -> None:
    """The outcomes as JSON, printed; and as JSON or as a page into the file of --report."""
    records = [outcome.to_dict() for outcome in outcomes]
    if output.as_json or output.report == STDOUT:
        print(json.dumps(records[0] if len(records) == 1 else records, indent=1))
    if output.report in (None, STDOUT):
        return
    if is_page_path(output.report):
        page = name_options(render_outcomes(outcomes, {"command": read_command()}), write_flag)
        write_text_atomically(output.report, page)
    else:
        write_text_atomically(output.report, mark_json("report", *records))


def find_card(loras: list[Path], output: OutputOptions, format: FormatLike | None) -> Path | None:
    """Where --card writes to; None where it was not asked for, or nothing is written."""
    if not output.card or output.dry_run:
        return None
    path = cast(Path, output.output)
    return place_card(path, len(loras) > 1 or path.is_dir() or writes_folder(loras, format))


def writes_folder(loras: list[Path], format: FormatLike | None) -> bool:
    """Whether a result is a PEFT folder."""
    came_so = any((lora / PEFT_CONFIG).is_file() for lora in loras)
    return format == "peft" or (came_so and format in (None, "auto"))


def read_command() -> str:
    """The command line as a shell takes it, for pages and cards, which people publish.

    In which folders files lie is nobody's business, and left out.
    """
    return shlex.join(["prolora", *map(_drop_folders, sys.argv[1:])])


def _drop_folders(word: str) -> str:
    """A word of a command line, without the folders of a path; a hub id is none."""
    option, equals, path = word.rpartition("=") if word.startswith("--") else ("", "", word)
    is_path = os.path.exists(path) or path.startswith((".", "~")) or os.path.isabs(path)
    return f"{option}{equals}{Path(path).name if is_path and Path(path).name else path}"


def check_outcomes(outcomes: list[Outcome]) -> None:
    """Raises the error that says what was not done as asked."""
    failed = [outcome for outcome in outcomes if outcome.error]
    if len(failed) == 1 == len(outcomes):
        raise cast(ProLoRAError, failed[0].error)
    if failed:
        names = ", ".join(outcome.lora.name for outcome in failed)
        what = "cannot be moved" if failed[0].planned else "were not moved"
        raise ProLoRAError(f"{len(failed)} of {len(outcomes)} LoRAs {what}: {names}")
    for outcome in outcomes:
        left_out = outcome.report.left_out if outcome.report else {}
        unknown = [name for name, why in left_out.items() if why == UNKNOWN_UPDATE]
        if outcome.report and (unread := [*outcome.report.unread, *unknown]):
            raise IncompleteResult(
                f"{outcome.lora}: {len(unread)} updates could not be read and stay behind, the "
                f"first of {unread[0]}"
            )


def show_outcomes(outcomes: list[Outcome], every_module: bool) -> None:
    """The whole report of one LoRA, or a line for each of several."""
    if len(outcomes) > 1:
        out.print_table(draw_table(tabulate_outcomes(outcomes)))
        for line in failure_lines(outcomes):
            out.print_line(line, style="red")
        if len({outcome.lora for outcome in outcomes}) == 1:  # of two experts
            for outcome in outcomes:
                if outcome.status == "moved":
                    out.print_line(f"wrote {outcome.out}")
        return
    report = outcomes[0].report
    if report is not None:
        show_report(report, every_module)
        if not report.dry_run:
            readers = inspect(outcomes[0].out).readers
            read_by = f"; read by {', '.join(readers)}" if readers else ""
            out.print_line(f"wrote {outcomes[0].out}{read_by}")


def used_subspaces(outcome: Outcome) -> bool:
    """Whether a LoRA was moved by a method that looks into the basis cache."""
    return outcome.report is not None and any(row.measures for row in outcome.report.modules)


def show_report(report: Report, every_module: bool = False) -> None:
    """The tables and sentences of a report."""
    show_tables(out, report.tables(every_module, every_module))
    for sentence in report.sentences():
        style = "bold yellow" if sentence.startswith("No-go") else None
        out.print(sentence, style=style)
