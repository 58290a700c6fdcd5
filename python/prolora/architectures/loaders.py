"""What programs read of a family's LoRAs, measured with their code.

`bench/loader_matrix.py` runs the programs and makes `loaders.json`. For every family it has the
programs that have models of it (under ""), and for every way of spelling a file (`name_row`) what
each leaves unread, or reads with its rows in another order: patterns of modules. In a row of
aliases, numbered parts or fused projections these are patterns of names in the file. An empty list
is a file read whole, `["*"]` one of which nothing is read. `!` before the patterns: the program
stops at a file with one of them. `+` before a pattern: the program reads nothing of a file that has
none of these; for example, ComfyUI recognises a LoRA of Wan Fun by its cross attention. null: it
leaves more modules than are listed. `?`: how much it leaves is not known.

A program that is missing in a row reads nothing if the row is one that every program was tried
with: one of `rows`, or of the family's own formats. In any other row it was not tried.

A row with `TEXT` behind its name has the text encoders that programs leave unread in such a file;
for a missing program this is not known. A row with `ALPHA` behind it replaces the one before where
alphas are not as usual in the format.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from .family import PEFT, Family, Spelling
from .modules import find_component, is_in_text_encoder

Reach = Literal["whole", "part", "none", "stops"]
"""How much of a file a program reads. "stops": nothing, because of one of its modules."""
TEXT, ALPHA = " + text", " ± alpha"
"""Behind the name of a row: what programs do with text encoders; with alphas where the format has
none by itself, without them where it has."""
_NOTHING: Mapping[str, str] = MappingProxyType({})


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
        same = spelling.names == "authors" and not family.authors
        row = f"{spelling.prefix}|{'diffusers' if same else spelling.names}"
    return row + ALPHA * swapped


def list_spellings(family: Family) -> list[Spelling]:
    """Lists the spellings in which programs were tried with a family; none of a UNet."""
    aliases = {f"{one.prefix}|alias" for one in family.spellings.values()}
    written = {*_read_table()["rows"], *aliases}
    rows = (row.partition("|") for row in _read_table()["families"].get(family.id, {}))
    return [
        Spelling(prefix, names, prefix[-1:] != "_")
        for prefix, bar, names in rows
        if prefix + bar + names in written and prefix != PEFT.prefix
    ]


def list_programs(family: str) -> list[str]:
    """Lists the programs that were found to have models of a family."""
    return list(_read_table()["families"].get(family, {"": ()})[""])


def is_read(family: Family, spelling: Spelling) -> bool:
    """Returns whether a program reads this family's modules in a spelling.

    For aliases, some of them suffice: no program reads the aliases of all trainers.
    """
    reads = _read_table()["families"].get(family.id, {}).get(name_row(family, "", spelling), {})
    if spelling.names == "alias":
        return any(unread not in (None, ["*"], ["!"], ["?"]) for unread in reads.values())
    return [] in reads.values() or is_usual(family, spelling)


def is_usual(family: Family, spelling: Spelling) -> bool:
    """Returns whether one of this family's formats writes files in a spelling."""
    usual = {name_row(family, "", one) for one in family.spellings.values()}
    return name_row(family, "", spelling) in usual


def find_reach(
    family: Family, row: str, modules: Iterable[str], spelled: Mapping[str, str] = _NOTHING
) -> dict[str, Reach]:
    """Returns program -> how much it reads of a file, if that is known.

    Args:
        family: of the LoRA.
        row: from `name_row`.
        modules: the canonical names that the file updates.
        spelled: module -> the pattern of its name in the file, as in `AuthorsWeight.spelled`, where
            that is neither the authors' nor diffusers'.
    """
    names = list(modules)
    denoiser = {name for name in names if family.find_pattern(name)}
    if any(map(family.is_untried, denoiser)):
        return {}
    patterns = {spelled.get(name) or str(family.find_pattern(name)) for name in denoiser}
    programs, reads, encoders_lost = _look_up(family, row)
    reach: dict[str, Reach] = {}
    reach |= dict.fromkeys(programs, "none") if _is_tried_by_all(family, row) else {}
    for program, unread in reads.items():
        if unread == ["?"]:
            reach.pop(program, None)
        elif unread is None:
            reach[program] = "part"
        elif unread == ["!"]:
            reach[program] = "stops"
        elif unread == ["*"] or not _is_recognised(patterns, unread):
            reach[program] = "none"
        elif not patterns.intersection(unread):
            reach[program] = "whole"
        elif "!" in unread:
            reach[program] = "stops"
        else:
            reach[program] = "none" if patterns <= set(unread) else "part"
    encoders = {find_component(name) for name in names if is_in_text_encoder(name)}
    for program, lost in encoders_lost.items() if encoders else ():
        if program in reach:
            parts: set[Reach] = {reach[program]} if patterns else set()
            parts |= {"none" if one in lost else "whole" for one in encoders}
            reach[program] = parts.pop() if len(parts) == 1 else "part"
    return reach


def count_skipped(
    family: Family,
    row: str,
    modules: Iterable[str],
    program: str,
    spelled: Mapping[str, str] = _NOTHING,
) -> dict[str, int] | None:
    """Counts the modules that a program leaves out, by pattern or text encoder.

    Arguments as for `find_reach`. None where the table does not tell.
    """
    _, reads, encoders_lost = _look_up(family, row)
    unread, lost = reads.get(program), encoders_lost.get(program, [])
    if program not in reads and _is_tried_by_all(family, row):
        unread = ["*"]
    if unread is None or unread == ["?"]:
        return None
    names = [
        find_component(name)
        if is_in_text_encoder(name)
        else spelled.get(name) or family.find_pattern(name) or name
        for name in modules
    ]
    if not _is_recognised(names, unread):
        unread = ["*"]
    left = (name for name in names if name in unread or name in lost or unread == ["*"])
    return dict(Counter(left).most_common())


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
    reads = rows.get(plain, {})
    if plain != row and not _is_tried_by_all(family, row):
        # Further rows were counted with the usual alphas alone.
        choosy = {x for one, of in rows.items() if one.endswith(ALPHA) for x in of}
        reads = {program: unread for program, unread in reads.items() if program not in choosy}
    return rows[""], reads | rows.get(row, {}), rows.get(plain + TEXT, {})


def _is_recognised(patterns: Collection[str], unread: Iterable[str]) -> bool:
    """Returns whether a file has a pattern that the program looks for, if it looks for any."""
    needed = {one[1:] for one in unread if one.startswith("+")}
    return not needed or bool(needed.intersection(patterns))


def _is_tried_by_all(family: Family, row: str) -> bool:
    """Returns whether every program that has such models was tried with a row."""
    plain = row.removesuffix(ALPHA)
    own = (name_row(family, format, one) for format, one in family.spellings.items())
    return family.unet or plain in _read_table()["rows"] or plain in own


@cache
def _read_table() -> dict[str, dict[str, Any]]:
    text = resources.files(__package__).joinpath("loaders.json").read_text("utf-8")
    return dict(json.loads(text))
