"""`prolora basis`: the subspaces of a base model, computed beforehand, and what the cache holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..bases import open_base
from ..bases.cache import maintenance
from ..bases.cache.basis_cache import default_folder
from ..bases.cache.build import survey_base
from ..bases.memory import format_size, parse_size
from ..core.ops import operators
from ..core.projection import DEFAULT_RANK
from ..errors import ProLoRAError
from . import tables
from .common import (
    CacheOption,
    DeviceOption,
    JsonOption,
    MemoryOption,
    NoCacheOption,
    QuietOption,
    RankOption,
    cache_folder,
    memory_limit,
    parse_rank,
)

_AGES = {"h": 3600, "d": 86_400, "w": 7 * 86_400}

out = Console()
err = Console(stderr=True)


class _BuildUnlessNamed(TyperGroup):
    """`prolora basis BASE` stands for `prolora basis build BASE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["build", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_BuildUnlessNamed,
    no_args_is_help=True,
    help="Compute a base model's subspaces (`prolora basis BASE`), and look after the cache.",
)


@app.command()
def build(
    base: Annotated[str, typer.Argument(help="A base model: file, folder or hub id.")],
    rank: RankOption = str(DEFAULT_RANK),
    device: DeviceOption = "cpu",
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    max_memory: MemoryOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compute a base model's leading subspaces, keep them, and say how exact they are."""
    operators.require(device)
    opened = open_base(base)
    folder = cache_folder(cache, no_cache)
    with tables.progress_bar("basis", not (quiet or as_json) and err.is_terminal) as progress:
        rows = survey_base(
            opened,
            parse_rank(rank),
            cache=folder,
            device=device,
            max_memory=memory_limit(max_memory),
            progress=progress,
        )
    if as_json:
        print(json.dumps([row.to_dict() for row in rows], indent=1))
        return
    if not quiet:
        out.print(tables.survey_table(opened.name, rows))
        show_cache(folder)


@app.command("list")
def list_cache(cache: CacheOption = None, as_json: JsonOption = False) -> None:
    """Say what the cache holds, and how large it is."""
    found = maintenance.take_inventory(cache or default_folder())
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        for part in tables.inventory_parts(found):
            out.print(part, highlight=False, soft_wrap=isinstance(part, str))


@app.command()
def verify(
    base: Annotated[
        str | None,
        typer.Argument(help="Also hold the bases of this model against its weights."),
    ] = None,
    rank: RankOption = str(DEFAULT_RANK),
    cache: CacheOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare everything in the cache with its checksum, and with the weights of a base."""
    folder = cache or default_folder()
    with tables.progress_bar("verify", not (quiet or as_json) and err.is_terminal) as progress:
        found = maintenance.verify_cache(folder, base, parse_rank(rank), progress)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    elif not quiet:
        for sentence in tables.verification_lines(found, base, rank):
            out.print(sentence, highlight=False, soft_wrap=True)
    if not found.ok:
        bad = len(found.damaged) + len(found.wrong or {})
        raise ProLoRAError(
            f"{bad} bases in {folder} are not what they should be. They are recomputed when they "
            "are needed; `prolora basis prune` removes what is damaged"
        )


@app.command()
def prune(
    older_than: Annotated[
        str, typer.Option(help="Also bases not used for so long: 30d, 12h, 2w.")
    ] = "",
    max_size: Annotated[
        str, typer.Option(help="Also those not used for longest, down to this size: 5GiB.")
    ] = "",
    everything: Annotated[bool, typer.Option("--all", help="Everything in the cache.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what is of no use any more: files of killed processes, of other versions, damaged."""
    found = maintenance.prune_cache(
        cache or default_folder(),
        older_than=parse_age(older_than) if older_than else None,
        max_size=parse_size(max_size) if max_size else None,
        everything=everything,
        dry_run=dry_run,
    )
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    word = "would be removed" if dry_run else "removed"
    out.print(
        f"{found.files} files, {format_size(found.size)}, {word}; {format_size(found.left)} left.",
        highlight=False,
    )


def parse_age(text: str) -> float:
    """'30d', '12h', '2w' in seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([hdw])\s*", text.lower())
    if not match:
        raise ValueError(f"an age is a number of hours, days or weeks, as 12h, 30d or 2w: {text!r}")
    return float(match[1]) * _AGES[match[2]]


def show_cache(folder: Path | None) -> None:
    """A line that says where subspaces are kept and how much room they take."""
    if folder is not None:
        size = maintenance.measure_cache(folder)
        out.print(
            f"[dim]cache: {format_size(size)} in {folder} (`prolora basis list`, `prune`; "
            "--no-cache keeps nothing)[/dim]",
            highlight=False,
            soft_wrap=True,
        )
