"""What programs read of a family's LoRAs, measured with their code.

`bench/loader_matrix.py` runs the programs and makes `loaders.json`. For every family it has the
programs that have models of it (under ""), and for every way of spelling a file (`name_row`) what
each leaves unread, or reads with its rows in another order: patterns of modules. An empty list is a
file read whole; a missing program reads nothing. `!` before the patterns: the program stops at a
file with one of them. null: it leaves more modules than are listed. `?`: how much it leaves is not
known. A row with `TEXT` behind its name has the text encoders that programs leave unread in such a
file; for a missing program this is not known. A row with `ALPHA` behind it replaces the one before
where alphas are not as usual in the format.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple

from .family import PEFT, Family, Spelling
from .modules import find_component, is_in_text_encoder

Reach = Literal["whole", "part", "none"]
"""How much of a file a program reads."""
TEXT, ALPHA = " + text", " ± alpha"
"""Behind the name of a row: what programs do with text encoders; with alphas where the format has
none by itself, without them where it has."""


class Loader(NamedTuple):
    """A program that reads LoRAs."""

    title: str
    version: str  # the version that was tried
    kinds: Sequence[str] = ()  # of updates that it reads; () if only plain LoRAs were tried


@cache
def known_loaders() -> dict[str, Loader]:
    """Returns id -> program; `format` takes the ids."""
    return {id_: Loader(**facts) for id_, facts in _read_table()["programs"].items()}


def name_row(family: Family, format: str, spelling: Spelling | None, swapped: bool = False) -> str:
    """Returns the table's row for a UNet's format or another model's spelling.

    `swapped`: alphas are there in a format without, or missing in one that has them.
    """
    row = format
    if spelling is not None and not family.unet:
        row = f"{spelling.prefix}|{spelling.names if family.authors else 'diffusers'}"
    return row + ALPHA * swapped


def list_spellings(family: Family) -> list[Spelling]:
    """Lists the spellings in which programs were tried with a family; none of a UNet."""
    rows = (row.partition("|") for row in _read_table()["families"].get(family.id, {}))
    return [
        Spelling(prefix, "authors" if names == "authors" else "diffusers", prefix[-1:] != "_")
        for prefix, bar, names in rows
        if bar and names in ("authors", "diffusers") and prefix != PEFT.prefix
    ]


def list_programs(family: str) -> list[str]:
    """Lists the programs that were found to have models of a family."""
    return list(_read_table()["families"].get(family, {"": ()})[""])


def is_read(family: Family, spelling: Spelling) -> bool:
    """Returns whether a program reads this family's modules in a spelling."""
    rows = _read_table()["families"].get(family.id, {})
    whole = [] in rows.get(name_row(family, "", spelling), {}).values()
    return whole or is_usual(family, spelling)


def is_usual(family: Family, spelling: Spelling) -> bool:
    """Returns whether one of this family's formats writes files in a spelling."""
    usual = {name_row(family, "", one) for one in family.spellings.values()}
    return name_row(family, "", spelling) in usual


def find_reach(family: Family, row: str, modules: Iterable[str]) -> dict[str, Reach]:
    """Returns program -> how much it reads of a file, if that is known.

    `row` comes from `name_row`; `modules` are the canonical names that the file updates.
    """
    names = list(modules)
    patterns = {pattern for name in names if (pattern := family.find_pattern(name))}
    if any(pattern.startswith(family.untried) for pattern in patterns):
        return {}
    programs, reads, encoders_lost = _look_up(family, row)
    reach: dict[str, Reach] = dict.fromkeys(programs, "none")
    for program, unread in reads.items():
        if unread == ["?"]:
            del reach[program]
        elif unread is None:
            reach[program] = "part"
        elif unread == ["!"]:
            continue
        elif not patterns.intersection(unread):
            reach[program] = "whole"
        elif "!" not in unread and not patterns <= set(unread):
            reach[program] = "part"
    encoders = {find_component(name) for name in names if is_in_text_encoder(name)}
    for program, lost in encoders_lost.items() if encoders else ():
        if program in reach:
            parts: set[Reach] = {reach[program]} if patterns else set()
            parts |= {"none" if one in lost else "whole" for one in encoders}
            reach[program] = parts.pop() if len(parts) == 1 else "part"
    return reach


def count_skipped(
    family: Family, row: str, modules: Iterable[str], program: str
) -> dict[str, int] | None:
    """Counts the modules that a program leaves out, by pattern or text encoder.

    Arguments as for `find_reach`. None where the table does not tell.
    """
    _, reads, encoders_lost = _look_up(family, row)
    unread, lost = reads.get(program), encoders_lost.get(program, [])
    if unread is None or unread == ["?"]:
        return None
    names = [
        find_component(name) if is_in_text_encoder(name) else family.find_pattern(name) or name
        for name in modules
    ]
    return dict(Counter(name for name in names if name in unread or name in lost).most_common())


def find_untried(family: Family, row: str, modules: Iterable[str]) -> set[str]:
    """Returns the programs not tried with the text encoders of such a file.

    `row` comes from `name_row`; `modules` are the canonical names that the file updates.
    """
    programs, _, encoders_lost = _look_up(family, row)
    return set(programs) - encoders_lost.keys() if any(map(is_in_text_encoder, modules)) else set()


def _look_up(family: Family, row: str) -> tuple[Any, Any, Any]:
    """Returns the programs with such models, and what each leaves of modules and encoders."""
    rows = _read_table()["families"].get(family.id, {"": []})
    plain = row.removesuffix(ALPHA)
    return rows[""], rows.get(plain, {}) | rows.get(row, {}), rows.get(plain + TEXT, {})


@cache
def _read_table() -> dict[str, dict[str, Any]]:
    text = resources.files(__package__).joinpath("loaders.json").read_text("utf-8")
    return dict(json.loads(text))
