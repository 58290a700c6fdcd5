"""`prolora migrate`: a collection of LoRAs on its way to other bases."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..core.grouping import group_by
from ..core.methods import MethodChoice
from ..errors import OutputError
from ..fleet.batches import MigrationOptions
from ..fleet.migration import migrate as run_migration
from ..fleet.migration import read_words
from ..reports.report import summarise
from ..verbs.option_fields import take_option
from ..verbs.options import TransferMethod, TransferOptions
from .console import answer, err, out, progress_bar
from .exits import ExitCode
from .flags import JsonOption, base_option, path_option
from .options import expand_options, find_cache, take_bases

_SHOWN = 8
"""Reasons for refusals that are shown."""


@dataclass
class Work:
    """The bases, where the results go, and who does the work."""

    source: Annotated[str | None, base_option("Base model of the LoRAs.")] = None
    target: Annotated[list[str], base_option("Base model to move to; may be repeated.")] = field(
        default_factory=list
    )
    output: Annotated[
        Path | None, path_option("Folder of the results.", "--output", "-o", metavar="FOLDER")
    ] = None
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster to work on; local starts one here."),
    ] = None
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only this part, as 2/8, for array jobs.")
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would move, and write nothing.")
    ] = False
    as_json: JsonOption = False


@dataclass(frozen=True, kw_only=True)
class ByWeights(MigrationOptions):
    """How LoRAs are moved without running a model."""

    method: TransferMethod = take_option(
        TransferOptions,
        "method",
        help='How to move the LoRAs. "auto": a copy, or a refusal where the weights of the two '
        'models have nothing in common; "copy": the update as it is; "prolora": the paper.',
        words=get_args(MethodChoice),
    )


@expand_options("strength", "rank", "blocks", "again", "match", "target_steps", "look", "overwrite")
def migrate(
    loras: Annotated[
        list[str],
        typer.Argument(
            metavar="LORAS", help="LoRA files, folders, text files that list them, or hub ids."
        ),
    ],
    work: Work,
    moving: ByWeights,
) -> None:
    """Move a collection of LoRAs to one or more base models; run it again to go on."""
    if work.output is None and not work.dry_run:
        raise OutputError("-o FOLDER is missing: where should the new LoRAs be written?")
    loras, (source, target) = take_bases(loras, work.source, work.target)
    with progress_bar("migrate", not work.as_json) as progress:
        options = replace(find_cache(moving, not work.dry_run), progress=progress)
        how: Any = {name: getattr(work, name) for name in ("ray", "shard", "dry_run")}
        result = run_migration(loras, source, target, work.output or "", options, **how)
    refused = [moved for moved in result if moved.status == "refused"]
    if work.as_json:
        answer.write([asdict(moved) for moved in result])
    else:
        counts = Counter((moved.target, moved.status) for moved in result)
        for (target, status), count in sorted(counts.items()):
            out.print_line(f"{target}: {count} {status}")
        there = [moved for moved in result if moved.status in ("moved", "already there")]
        for folder, group in group_by(there, lambda moved: os.path.dirname(moved.out)).items():
            verdicts = [read_words(one) for one in group]
            out.print_line(summarise(f"{folder}{os.sep}", verdicts), style="bold")
    reasons = group_by(refused, lambda moved: moved.error.removeprefix(f"{moved.lora}: "))
    for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1]))[:_SHOWN]:
        err.print_line(f"{len(group)} refused, as {group[0].lora}: {reason}", style="yellow")
    if refused:
        sys.exit(ExitCode.REFUSED)
    if any(moved.unread for moved in result):
        sys.exit(ExitCode.INCOMPLETE)
