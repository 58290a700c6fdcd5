"""Flags that every command has, and the words of messages; needs no torch."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ProLoRAError
from ..files.hub import keep_path


def parse_path(text: str | Path) -> Path:
    """Reads a path; '' is refused, since it would mean the current folder."""
    if not str(text):
        raise typer.BadParameter("the path is empty")
    return Path(text)


def parse_input(text: str | Path) -> Path:
    """Reads a path or an id on the hub; what is typed as a path, as `./a/b`, stays one."""
    parse_path(text)
    return keep_path(text)


def parse_base(text: str) -> str:
    """Returns a base as text, since it may be an id on the hub; '' is refused."""
    if not text:
        raise typer.BadParameter("the name of the base is empty")
    return text


def base_option(help: str, metavar: str = "BASE") -> Any:
    """Makes an option that takes a base model."""
    return typer.Option(parser=parse_base, metavar=metavar, help=help)


def base_argument(help: str, metavar: str = "BASE") -> Any:
    """Makes an argument that is a base model."""
    return typer.Argument(parser=parse_base, metavar=metavar, help=help)


def path_option(help: str, *flags: str, metavar: str = "FILE") -> Any:
    """Makes an option that takes a path; `flags` are those that differ from its name."""
    return typer.Option(*flags, parser=parse_path, metavar=metavar, help=help)


def path_argument(help: str, metavar: str = "FILE") -> Any:
    """Makes an argument that is a path, or an id on the hub."""
    return typer.Argument(parser=parse_input, metavar=metavar, help=help)


FLAGS = {"format": ("--format", "--for"), "program": ("--for",)}
"""Options with another flag than their name."""


COMMANDS = {"transfer_many": "transfer"}
"""Functions that are commands of another name."""


@cache
def list_options() -> set[str]:
    """Lists what messages may name, and a command has a flag for."""
    from ..verbs.options import TransferOptions

    shown = {f.name for f in dataclasses.fields(TransferOptions) if f.metadata["shown"].panel}
    others = "source target base program ray shard target_guidance strengths alpha"
    return shown | set(others.split())


def write_flag(option: str, value: str | None = None) -> str | None:
    """Writes an option of Python as a flag, `--match name`; a function as its command."""
    if value == "()":
        return f"`prolora {COMMANDS.get(option, option)}`"
    # The list of all options loads torch, which the answers of `check` can do without.
    if option not in FLAGS and option not in list_options():
        return None
    flag = FLAGS.get(option, (f"--{option.replace('_', '-')}",))[0]
    return flag if value in (None, "True") else f"{flag} {value}"


OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what exists, which is refused otherwise."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def split_bases(files: list[Path], most: int) -> tuple[list[Path], list[str]]:
    """Splits base models off the end of a list of files."""
    bases: list[str] = []
    while len(files) > 1 and len(bases) < most and _is_base(files[-1]):
        files, bases = files[:-1], [str(files[-1]), *bases]
    return files, bases


def _is_base(file: Path) -> bool:
    from ..checking.check import check

    try:
        return check(file).kind == "base"
    except ProLoRAError:
        return False
