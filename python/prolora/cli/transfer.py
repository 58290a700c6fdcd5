"""`prolora transfer`: what it asks of the library, and its result for people."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

from ..adapters.formats.programs import Readers
from ..adapters.lora import Lora
from ..bases.base import Progress
from ..bases.experts import ExpertPair, Experts, choose_pairs, pair_experts
from ..best import transfer as transfer_lora
from ..best import transfer_many
from ..checking.check import check
from ..errors import OutputError, ProLoRAError, name_options
from ..files.hub import spell_path
from ..files.store import put_text
from ..reports.card import check_card, write_card
from ..reports.lora_report import LoraReport
from ..reports.outcome import Outcome, OutcomesReport, is_report_of
from ..reports.report import is_page_path, summarise
from ..verbs.batch import run_each
from ..verbs.options import FormatLike, TransferOptions
from ..verbs.output_paths import check_results_folder, is_peft_folder
from ..verbs.result import Transfer
from .console import answer, err, out, progress_bar, weight_stages
from .exits import IncompleteResult, describe_error
from .flags import path_argument, write_flag
from .options import (
    BriefCommand,
    ExpertBases,
    HelpAllOption,
    OutputFlags,
    expand_options,
    find_cache,
)
from .outputs import (
    append_to_name,
    check_lora_name,
    check_report,
    is_folder_of_loras,
    list_outputs,
    read_command,
)
from .tables import show_tables, show_words

STDOUT = Path("-")
"""The path that stands for standard output."""
STAGES = (
    {"reading": 0.12, "matching": 0.01, "checking": 0.70, "": 0.02, "writing": 0.15},
    {"reading": 0.01, "matching": 0.01, "checking": 0.03, "": 0.94, "writing": 0.01},
)
"""Shares of the time from SDXL to SSD-1B, without and with the bases' subspaces."""
MOST_NAMED = 4
"""Programs that read nothing of a file, in a line for people who did not ask for all."""

LoraArguments = Annotated[
    list[Path], path_argument("LoRA files, PEFT folders or hub ids.", metavar="LORA")
]


class TransferCommand(BriefCommand):
    """`prolora transfer`, whose short help has what most people need of it."""

    first = "source target method strength out_rank format output report dry_run help_all"


@expand_options()
def transfer(
    loras: LoraArguments,
    bases: ExpertBases,
    moving: TransferOptions,
    output: OutputFlags,
    help_all: HelpAllOption = False,
) -> None:
    """Write the LoRA that belongs on another base model."""
    loras, source, target = bases.open(loras)
    check_output_given(output, loras)
    files = [file for base in (*source.values(), *target.values()) for file in base.files]
    card = check_outputs(loras, output, moving, files, pair_experts(source, target))
    # A dry run makes no cache folder.
    options = find_cache(moving, takes_default=not output.dry_run)
    run = plan_all if output.dry_run else move_loras
    outcomes = run(loras, source, target, output, options)
    print_outcomes(outcomes, output, card, moving.overwrite)


def check_output_given(output: OutputFlags, loras: Sequence[Path] = ()) -> None:
    """Refuses a missing -o, or a file for several LoRAs."""
    if output.output is not None:
        check_results_folder(output.output, len(loras))
    if output.output is None and not output.dry_run:
        raise OutputError("-o OUT is missing: where should the new LoRA be written?")


def check_outputs(
    loras: list[Path],
    output: OutputFlags,
    options: Any,
    files: list[Path],
    pairs: Sequence[ExpertPair] = (),
) -> Path | None:
    """Refuses outputs that cannot be written, before any work is done for them.

    Returns where the card goes; None without one.
    """
    outputs = list_outputs(output.output, loras, pairs, options.format or "auto")
    if output.output is not None and len(loras) == 1:
        try:
            check_lora_name(output.output, writes_folder(loras, options.format))
        except OutputError:
            if pairs:  # an input that cannot be read is told first
                Lora.open(loras[0]).close()
            raise
    if output.report not in (None, STDOUT):
        check_report(output.report, outputs, loras, files, options.overwrite)
    if not output.card or output.dry_run:
        return None
    path = cast(Path, output.output)
    in_folder = len(loras) > 1 or path.is_dir() or writes_folder(loras, options.format)
    return check_card(path, in_folder, options.overwrite)


def print_outcomes(
    outcomes: list[Outcome],
    output: OutputFlags,
    card: Path | None,
    overwrite: bool,
) -> None:
    """Shows what was done, writes report and card, and raises what failed."""
    if output.show_tables:
        show_outcomes(outcomes, output)
    elif len(outcomes) > 1:
        for line in failure_lines(outcomes):
            err.print_line(line, style="red")
    write_outcomes(outcomes, output, overwrite)
    if card is not None:
        write_card(card, outcomes, overwrite)
    if output.show_tables:
        for path in (output.report, card):
            if path not in (None, STDOUT) and path.exists():
                out.print_line(f"wrote {path}")
    check_outcomes(outcomes)


def print_made_lora(
    made_of: Path, report: LoraReport, output: OutputFlags, overwrite: bool = False
) -> None:
    """Reports the outcome of one LoRA that was made without being moved."""
    out = made_of if output.output is None else output.output
    outcome = Outcome(made_of, out, report, planned=output.dry_run)
    print_outcomes([outcome], output, None, overwrite)


def plan_all(
    loras: list[Path],
    source: Experts,
    target: Experts,
    output: OutputFlags,
    options: TransferOptions,
) -> list[Outcome]:
    """Plans each transfer."""
    pairs = pair_experts(source, target)
    moves = [(lora, *chosen) for lora in loras for chosen in choose_pairs(lora, pairs)]
    outs = [append_to_name(lora, appended) for lora, _, appended in moves]

    def plan(i: int, _: Path, progress: Progress | None) -> Transfer:
        lora, pair = moves[i][:2]
        options_of_file = replace(options.for_file(), progress=progress)
        return transfer_lora(lora, pair.source, pair.target, options_of_file, dry_run=True)

    return plan_each([lora for lora, _, _ in moves], outs, plan, output)


def plan_each(
    loras: list[Path],
    outs: list[Path],
    plan: Callable[[int, Path, Progress | None], Transfer],
    output: OutputFlags,
) -> list[Outcome]:
    """Plans one LoRA after the other; one of several that is refused does not stop the others."""
    with progress_bar("plan", output.show_tables) as progress:
        outcomes = run_each(loras, outs, plan, progress)
    if len(outcomes) == 1 and (error := outcomes[0].error):
        raise error
    return [replace(outcome, planned=True, seconds=0.0) for outcome in outcomes]


def move_loras(
    loras: list[Path],
    source: Experts,
    target: Experts,
    output: OutputFlags,
    options: TransferOptions,
) -> list[Outcome]:
    """Moves one LoRA into files, one per expert, or several into a folder."""
    path, outcomes = cast(Path, output.output), []
    with progress_bar("transfer", output.show_tables) as progress:
        weighed = weight_stages(progress, STAGES[options.method == "prolora"])
        options = replace(options, progress=weighed)
        if len(loras) > 1 or is_folder_of_loras(path, options.format):
            return transfer_many(loras, source, target, path, options)
        for pair, appended in choose_pairs(loras[0], pair_experts(source, target)):
            out = append_to_name(path, appended)
            report = transfer_lora(loras[0], pair.source, pair.target, options, out=out).report
            outcomes.append(Outcome(loras[0], out, report, kept=report.dry_run))
    return outcomes


def write_outcomes(outcomes: list[Outcome], output: OutputFlags, overwrite: bool) -> None:
    """Prints the outcomes as JSON, and writes the JSON or page of --report."""
    path = None if output.report == STDOUT else output.report
    as_page = path is not None and is_page_path(path)
    if not output.show_tables or not (path is None or as_page):
        records = [outcome.to_dict() for outcome in outcomes]
        document = records[0] if len(records) == 1 else records
    if not output.show_tables:
        answer.write(document)
    if path and not overwrite and is_report_of(path, [outcome.out for outcome in outcomes]):
        return  # of a run that was killed at its end; its numbers are nowhere else
    if path is not None:
        text = render_outcomes(outcomes) if as_page else json.dumps(document, indent=1) + "\n"
        put_text(path, text, overwrite=overwrite)


def render_outcomes(outcomes: list[Outcome]) -> str:
    """Renders outcomes as one HTML file: one whole report, or several rows."""
    first, facts = outcomes[0], {"command": read_command()}
    report = first.report if len(outcomes) == 1 else None
    if report is not None:
        titles = {"LoRA": first.lora.name}  # without the folder, which is private
        facts = titles | ({} if first.planned else {"written to": first.out.name}) | facts
    return (report or OutcomesReport(outcomes)).to_html(facts, spell_flags)


def spell_flags(text: str) -> str:
    """Writes options in a text as flags."""
    return name_options(text, write_flag)


def writes_folder(loras: list[Path], format: FormatLike | None) -> bool:
    """Returns whether a result is a PEFT folder."""
    came_so = any(map(is_peft_folder, loras))
    return format == "peft" or (came_so and format in (None, "auto"))


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
        if unread := outcome.unread:
            raise IncompleteResult(
                f"{spell_path(outcome.lora)}: {len(unread)} updates could not be read and stay "
                f"behind, the first of {unread[0]}"
            )


def show_outcomes(outcomes: list[Outcome], output: OutputFlags) -> None:
    """Shows the whole report of one LoRA, or a line for each of several."""
    if len(outcomes) > 1:
        show_tables(out, OutcomesReport(outcomes).tables())
        for line in failure_lines(outcomes):
            out.print_line(line, style="red")
        if len({outcome.lora for outcome in outcomes}) == 1:  # of two experts
            for outcome in outcomes:
                if outcome.status == "moved":
                    out.print_line(f"wrote {outcome.out}")
        elif there := [one for one in outcomes if one.status in ("moved", "already there")]:
            folder = f"{there[0].out.parent}{os.sep}"
            out.print_line(summarise(folder, [one.words for one in there]), style="bold")
        return
    report = outcomes[0].report
    if outcomes[0].kept:
        show_words(out, outcomes[0].words)
        out.print_line(f"kept {outcomes[0].out}, made of the same; --overwrite makes it anew")
    elif report is not None:
        show_report(report)
        if not report.dry_run:
            out.print_line(f"wrote {outcomes[0].out}")
            readers = describe_readers(check(outcomes[0].out).readers)
            if readers:
                out.print_line(readers)
            if output.report is None:
                out.print("--report FILE.html has the numbers behind this.", style="dim")


def describe_readers(readers: Readers) -> str:
    """Reports who reads a file whole, in part, or not at all; many of the last are only counted."""
    none = readers.none
    if len(none) > MOST_NAMED:
        none = (*none[: MOST_NAMED - 1], f"{len(none) - MOST_NAMED + 1} others")
    text = str(readers._replace(none=none))
    return text[:1].upper() + text[1:]


def show_report(report: LoraReport) -> None:
    """Shows the verdict in words, and the numbers of a dry run."""
    show_words(out, report.in_words())
    if report.dry_run:
        show_tables(out, report.tables())
        for sentence in report.sentences():
            out.print(sentence)


def failure_lines(outcomes: list[Outcome]) -> list[str]:
    """Lists why LoRAs were not moved, a line each."""
    lines, several = [], OutcomesReport(outcomes)
    for outcome in outcomes:
        if outcome.error:
            message, command = describe_error(outcome.error)
            lines += [f"{several.name(outcome)}: {message}", *filter(None, [command])]
    return lines
