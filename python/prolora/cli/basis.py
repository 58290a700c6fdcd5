"""`prolora basis`: the subspaces of a base model, computed beforehand, and what the cache holds."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..bases import open_base
from ..bases.cache import maintenance
from ..bases.cache.basis_cache import default_folder
from ..bases.cache.build import ShapeSurvey, survey_base
from ..bases.cache.maintenance import Inventory, VerifyResult
from ..core.projection import DEFAULT_RANK
from ..errors import ProLoRAError
from ..files.sizes import format_size, parse_size
from ..workflow.table import Column, Row, Table, make_table, write_extremes
from .console import answer, out, progress_bar
from .exits import write_epilog
from .options import (
    CacheOption,
    JsonOption,
    QuietOption,
    RankOption,
    Resources,
    base_argument,
    expand_options,
    parse_rank,
)
from .tables import draw_table

_AGES = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


class _BuildUnlessNamed(TyperGroup):
    """`prolora basis BASE` stands for `prolora basis build BASE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["build", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_BuildUnlessNamed,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Compute a base model's subspaces (prolora basis BASE), and look after the cache.",
    epilog=write_epilog("prolora basis ssd-1b/", "prolora basis list"),
)


@app.command(
    epilog=write_epilog("prolora basis ssd-1b/", "prolora basis build ssd-1b/ --device cuda")
)
@expand_options
def build(
    base: Annotated[str, base_argument("A base model: file, folder or hub id.")],
    resources: Resources,
    rank: RankOption = str(DEFAULT_RANK),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compute a base model's leading subspaces, keep them, and say how exact they are."""
    resources.check_device()
    opened = open_base(base)
    how = resources.read()
    with progress_bar("basis", not (quiet or as_json)) as progress:
        rows = survey_base(opened, parse_rank(rank), **how, progress=progress)
    if as_json:
        answer.give([row.to_dict() for row in rows])
        return
    if not quiet:
        out.print_table(draw_table(survey_table(opened.name, rows)))
        show_cache(how["cache"])


@app.command("list", epilog=write_epilog("prolora basis list"))
def list_cache(cache: CacheOption = None, as_json: JsonOption = False) -> None:
    """Say what the cache holds, and how large it is."""
    inventory = maintenance.take_inventory(find_folder(cache))
    if as_json:
        answer.give(inventory.to_dict())
    else:
        show_inventory(inventory)


@app.command(epilog=write_epilog("prolora basis verify", "prolora basis verify ssd-1b/"))
def verify(
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE", help="Also compare the bases of this model with its weights."
        ),
    ] = None,
    rank: RankOption = str(DEFAULT_RANK),
    cache: CacheOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare everything in the cache with its checksum, and with the weights of a base."""
    folder = find_folder(cache)
    with progress_bar("verify", not (quiet or as_json)) as progress:
        result = maintenance.verify_cache(folder, base, parse_rank(rank), progress)
    if as_json:
        answer.give(result.to_dict())
    elif not quiet:
        for sentence in verification_lines(result, base, rank):
            out.print_line(sentence)
    if not result.ok:
        bad = len(result.damaged) + len(result.wrong or {})
        raise ProLoRAError(
            f"{bad} bases in {folder} are not what they should be. They are recomputed when they "
            "are needed; `prolora basis prune` removes what is damaged"
        )


@app.command(
    epilog=write_epilog("prolora basis prune --dry-run", "prolora basis prune --older-than 30d")
)
def prune(
    older_than: Annotated[
        str,
        typer.Option(metavar="AGE", help="Also remove bases not used for so long: 30d, 12h, 2w."),
    ] = "",
    max_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Also remove the bases not used for longest, until this size is left: 5GiB.",
        ),
    ] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Remove everything in the cache.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove useless files from the cache: damaged, of other versions, of killed processes."""
    result = maintenance.prune_cache(
        find_folder(cache),
        older_than=parse_age(older_than) if older_than else None,
        max_size=parse_size(max_size) if max_size else None,
        everything=everything,
        dry_run=dry_run,
    )
    if as_json:
        answer.give(asdict(result))
        return
    word = "would be removed" if dry_run else "removed"
    out.print(
        f"{result.files} files, {format_size(result.size)}, {word}; "
        f"{format_size(result.left)} left."
    )


def find_folder(cache: Path | None) -> Path:
    """The cache folder asked for, or the default; it need not exist.

    Raises:
        OSError: it is there and cannot be listed. It must not look like an empty cache.
    """
    folder = cache or default_folder()
    with suppress(FileNotFoundError):
        os.listdir(folder)
    return folder


def parse_age(text: str) -> float:
    """'30d', '12h', '2w' in seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([hdw])\s*", text.lower())
    if not match:
        raise ValueError(f"an age is a number of hours, days or weeks, as 12h, 30d or 2w: {text!r}")
    return float(match[1]) * _AGES[match[2]]


def show_cache(folder: Path | None) -> None:
    """A line that says where subspaces are kept and how much room they take."""
    if folder is not None:
        size = format_size(maintenance.measure_cache(folder))
        out.print_line(
            f"cache: {size} in {folder} (`prolora basis list`, `prune`; --cache none has none)",
            style="dim",
        )


def survey_table(name: str, rows: list[ShapeSurvey]) -> Table:
    """The subspaces of a base, a row per shape."""
    columns = [Column("shape", ""), Column("n", "d"), Column("columns", "")]
    columns += [Column("energy", ".1%"), Column("angle bound", ".1e"), Column("flagged", "d")]
    shown = [
        Row(
            (
                *("×".join(map(str, row.shape)), row.count),
                write_extremes((row.columns_min, row.columns_max)),
                *(row.energy, row.bound, row.flagged, row.rungs, row.seconds),
            )
        )
        for row in rows
    ]
    return make_table(name, [*columns, Column("how", ""), Column("seconds", ".1f")], shown)


def show_inventory(inventory: Inventory) -> None:
    """What a cache holds: a row for each base model and rank rule, and what else there is."""
    if inventory.shelves:
        out.print_table(draw_table(inventory_table(inventory)))
    else:
        out.print("The cache holds no bases.")
    notes = format_size(inventory.notes)
    out.print_line(f"folder: {inventory.folder}; index and tables: {notes}")
    for (count, size), what in (
        (inventory.temporary, "temporary files"),
        (inventory.foreign, "files of other versions, or damaged"),
    ):
        if count:
            out.print(f"{count} {what}, {format_size(size)}: `prolora basis prune` removes them")


def inventory_table(inventory: Inventory) -> Table:
    """The bases in a cache, a row for each base model and rank rule."""
    texts = [Column(name, "") for name in ("rank", "bases", "size", "stored", "columns")]
    columns = [Column("base"), *texts, Column("bound", ".0e"), Column("used", "")]
    rows = [
        Row(
            (
                *(shelf.base or "(in memory)", shelf.rule, str(shelf.count)),
                *(format_size(shelf.size), shelf.dtypes),
                write_extremes((shelf.columns_min, shelf.columns_max)),
                *(shelf.bound, date.fromtimestamp(shelf.used).isoformat()),
            )
        )
        for shelf in inventory.shelves
    ]
    return make_table(f"{format_size(inventory.size)} in the cache", columns, rows)


def verification_lines(result: VerifyResult, base: str | None, rank: str) -> list[str]:
    """The result of a verification, in sentences."""
    lines = [f"{result.checked} bases are what was written; {len(result.damaged)} are damaged."]
    lines += [f"  {path}: {reason}" for path, reason in result.damaged.items()]
    if base is not None:
        lines.append(
            f"{result.recomputed} bases of {base} at rank {rank} were compared with its weights: "
            f"{len(result.wrong or {})} are wrong; {result.absent} weights have none here."
        )
        lines += [f"  {module}: {reason}" for module, reason in (result.wrong or {}).items()]
    return lines
