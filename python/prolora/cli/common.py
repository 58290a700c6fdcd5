"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from ..bases.cache.basis_cache import BasisCache, default_folder
from ..bases.memory import parse_size
from ..errors import OutputError

# Text and not Path: a base may be an id on the hub, hf://org/name.
SourceOption = Annotated[
    str, typer.Option(help="Base the LoRA was trained on: file, folder or hub id (org/name).")
]
TargetOption = Annotated[
    str, typer.Option(help="Base it shall move to: file, folder or hub id (org/name).")
]
RankOption = Annotated[
    str, typer.Option(help="Columns of the subspaces (320), or the energy they hold (0.99).")
]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
MatchOption = Annotated[
    str,
    typer.Option(help="'name', 'similarity', or a JSON file {target module: source module}."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps what is learnt of the bases, so that the next LoRA need not wait; "
        "default: PROLORA_CACHE, or the user's cache folder.",
        show_default=False,
    ),
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Neither look into a cache nor keep anything.")
]
MemoryOption = Annotated[
    str, typer.Option(help="Memory this process may take, as 2GiB; refused if it is too little.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no tables.")]

log = logging.getLogger(__name__)


def cache_folder(cache: Path | None, no_cache: bool) -> Path | None:
    """The folder to use: the one asked for, or the default where it can be made; or none."""
    if no_cache:
        if cache is not None:
            raise ValueError("--cache and --no-cache contradict each other: give one of them")
        return None
    if cache is not None:
        return cache
    folder = default_folder()
    try:
        BasisCache(folder)
    except OutputError as error:
        log.warning("nothing is kept for the next LoRA: %s", error)
        return None
    return folder


def memory_limit(text: str) -> int | None:
    """--max-memory in bytes; None where it is not given."""
    return parse_size(text) if text else None


def parse_rank(text: str) -> int | float:
    """'320' as an int, '0.9' as a share of energy."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--rank takes an integer or a share like 0.9, not {text!r}") from None
