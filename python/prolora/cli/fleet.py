"""`prolora plan`, `migrate` and `status`: a collection of LoRAs on its way to other bases."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.table import Table

from ..core.grouping import group_by
from ..files.sizes import format_size
from ..workflow.fleet.migration import migrate as run_migration
from ..workflow.fleet.outcomes import Reason, gather_reasons
from ..workflow.fleet.plan import Entry, PairOfBases, Plan, estimate_worker_memory
from ..workflow.fleet.planning import plan_migration
from ..workflow.fleet.result_folder import FAILED, SUMMARY_PAGE
from ..workflow.fleet.run_options import MigrationOptions
from ..workflow.fleet.status import Status, read_status
from ..workflow.fleet.summary import Summary
from ..workflow.options import TransferOptions
from ..workflow.output_paths import check_beside
from .console import PlainConsole, answer, err, out, progress_bar
from .exits import ExitCode
from .options import (
    FleetResources,
    JsonOption,
    QuietOption,
    base_option,
    expand_options,
    path_argument,
    path_option,
)
from .tables import draw_facts

_REASONS, _FILES = 8, 3
"""Most reasons that are shown, and most LoRAs that each names."""


@dataclass
class Collection:
    """The bases of a plan."""

    source: Annotated[
        list[str],
        base_option(
            "Base model that the LoRAs were trained on: file, folder or hub id. With several "
            "--source, each LoRA's header and keys tell which it belongs to."
        ),
    ]
    target: Annotated[list[str], base_option("Base model to move to; may be repeated.")]


@dataclass
class PlanOutput:
    """Where the plan goes, and what is shown."""

    panel: ClassVar[str] = "Output"
    output: Annotated[Path, path_option("The plan, JSON lines.", "--output", "-o")] = Path(
        "plan.jsonl"
    )
    as_json: JsonOption = False
    quiet: QuietOption = False


@expand_options
def plan(
    loras: Annotated[
        list[str],
        typer.Argument(
            metavar="LORAS",
            help="LoRA files, folders, text files that list them, or hub ids.",
        ),
    ],
    bases: Collection,
    moving: TransferOptions,
    output: PlanOutput,
) -> None:
    """Plan the move of a collection of LoRAs to one or more base models; reads headers only."""
    shown = not (output.as_json or output.quiet)
    check_beside(output.output, "plan", overwrite=moving.overwrite)
    with progress_bar("plan", shown) as progress:
        how = replace(moving, overwrite=False)  # is for the plan's own file
        made = plan_migration(loras, bases.source, bases.target, how, progress=progress)
    made.save(output.output, overwrite=moving.overwrite)
    if output.as_json:
        answer.give(describe_plan(made))
    elif shown:
        out.print_table(plan_table(made))
        show_reasons(find_refusals(made))
        out.print_line(f"wrote {output.output}")
    else:
        show_reasons(find_refusals(made), console=err)
    if any(entry.refused for entry in made.entries):
        sys.exit(ExitCode.REFUSED)


@expand_options
def migrate(
    plan: Annotated[Path, path_argument("What `prolora plan` wrote.", metavar="PLAN")],
    output: Annotated[
        Path, path_option("Folder of the results.", "--output", "-o", metavar="FOLDER")
    ],
    how: MigrationOptions,
    resources: FleetResources,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Carry out a plan; run it again to resume."""
    resources.check_device()
    shown = not (as_json or quiet)
    with progress_bar("migrate", shown) as progress:
        how = replace(how, **resources.read(), progress=progress)
        summary = run_migration(plan, output, how)
    if as_json:
        answer.give(summary.to_dict())
    elif shown:
        out.print_table(summary_table(summary))
        show_reasons(summary.reasons, output / FAILED)
        out.print_line(f"wrote {output / SUMMARY_PAGE}")
    else:
        show_reasons(summary.reasons, output / FAILED, console=err)
    if summary.count("failed") or summary.count("refused"):
        sys.exit(ExitCode.REFUSED)
    if summary.count("incomplete"):
        sys.exit(ExitCode.INCOMPLETE)


def status(
    folder: Annotated[
        Path, path_argument("What `prolora migrate` was given as -o.", metavar="FOLDER")
    ],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read every result, and compare its bytes with those written."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say how far a migration is, while it runs or after it."""
    found = read_status(folder, verify=verify)
    if as_json:
        answer.give(found.to_dict())
    else:
        out.print_table(status_table(found))
        show_reasons(found.reasons, folder / FAILED)
        for name, why in (found.damaged or {}).items():
            out.print_line(f"damaged: {folder / name}: {why}", style="yellow")
        if found.damaged:
            out.print_note("Remove what is damaged and run prolora migrate again.")
    if found.damaged:
        sys.exit(ExitCode.REFUSED)


def describe_plan(made: Plan) -> dict[str, Any]:
    """A plan in numbers, ready for JSON."""
    return {
        "moves": sum(not entry.refused for entry in made.entries),
        "refused": sum(bool(entry.refused) for entry in made.entries),
        "pairs": [
            {
                **asdict(pair),
                "loras": len(entries),
                "bytes": sum(entry.size for entry in entries),
                "seconds": round(sum(entry.seconds for entry in entries), 3),
                "memory": estimate_worker_memory(entries),
            }
            for pair, entries in group_entries(made).items()
        ],
        "reasons": {text: asdict(reason) for text, reason in find_refusals(made).items()},
        "notes": dict(made.notes),
    }


def find_refusals(made: Plan) -> dict[str, Reason]:
    """Why LoRAs of a plan cannot move, and which."""
    return gather_reasons((entry, entry.refused) for entry in made.entries if entry.refused)


def group_entries(made: Plan) -> dict[PairOfBases, list[Entry]]:
    """The entries that move, by pair of bases."""
    moving = (entry for entry in made.entries if not entry.refused)
    return group_by(moving, lambda entry: entry.pair)


def plan_table(made: Plan) -> Table:
    """A line for each pair of bases, with what it is estimated to cost."""
    table = Table(title=f"{len(made.entries)} moves, from headers alone")
    for name in ("from", "to"):
        table.add_column(name, overflow="fold")
    for name in ("LoRAs", "bytes", "time", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair, entries in group_entries(made).items():
        table.add_row(
            pair.source,
            f"{pair.target} {pair.expert}".rstrip(),
            str(len(entries)),
            format_size(sum(entry.size for entry in entries)),
            format_time(sum(entry.seconds for entry in entries)),
            format_size(estimate_worker_memory(entries)),
        )
    return table


def summary_table(summary: Summary) -> Table:
    """A line for each family and pair of bases."""
    table = Table(title=summary.sentence())
    for name in ("family", "from", "to"):
        table.add_column(name, overflow="fold")
    for name in ("moved", "failed", "refused", "left", "coverage"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in summary.groups:
        numbers = (group.done, group.failed, group.refused, group.left)
        coverage = "" if group.coverage is None else f"{group.coverage:.0%}"
        table.add_row(group.family, group.source, group.target, *map(str, numbers), coverage)
    return table


def status_table(found: Status) -> Table:
    """The numbers of a migration, one a line."""
    states = ("done", "failed", "refused", "left")
    facts = [(name, f"{getattr(found, name)} of {found.total}") for name in states]
    facts.append(("at work", f"{found.at_work} processes" if found.at_work else "no process"))
    if found.rate:
        facts.append(("rate", f"{found.rate:.3g} LoRAs a second"))
    if found.seconds_left is not None and found.left:
        facts.append(("time to go", format_time(found.seconds_left)))
    return draw_facts(facts)


def show_reasons(
    reasons: Mapping[str, Reason], all_of_them: Path | None = None, console: PlainConsole = out
) -> None:
    """The most frequent reasons for what does not move, and some of the LoRAs.

    Args:
        reasons: the most frequent first.
        all_of_them: the file that lists all; None where there is none.
        console: where it is said; a quiet command still says on standard error what it refused.
    """
    for text, reason in list(reasons.items())[:_REASONS]:
        console.print_line(f"{reason.count} not moved: {text}", style="yellow")
        more = len(reason.files) - _FILES
        named = [*reason.files[:_FILES], *([f"and {more} more"] if more > 0 else [])]
        for name in named:
            console.print_line(f"    {name}")
    if len(reasons) > _REASONS:
        console.print_note(f"and {len(reasons) - _REASONS} more reasons")
    if reasons and all_of_them is not None and all_of_them.exists():
        console.print_line(f"all of them, with the reasons: {all_of_them}")


def format_time(seconds: float) -> str:
    """Seconds for people: "42 s", "12 min", "3.4 h", "2.1 days"."""
    for unit, size in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
