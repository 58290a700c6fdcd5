"""What programs read of a family's LoRAs, measured with their code.

`bench/loader_matrix.py` runs the programs and makes `loaders.json`. For every family it has the
programs that have models of it (under ""), and for every way of spelling a file (`name_row`) what
each leaves unread, or reads with its rows in another order: patterns of modules. In a row of
aliases, numbered parts or fused projections these are patterns of names in the file. An empty list
is a file read whole, `["*"]` one of which nothing is read. `!` before the patterns: the program
stops at a file with one of them. `+` before a pattern: the program reads nothing of a file that has
none of these; for example, ComfyUI recognises a LoRA of Wan Fun by its cross attention. `*.` stands
for all numbers and blocks of a UNet: `*.attn1.to_q`. null: it leaves more modules than are listed.
`?`: how much it leaves is not known.

A program that is missing in a row reads nothing if the row is one that every program was tried
with: one of `rows`, or of the family's own formats. In any other row it was not tried. A row of a
UNet is named by its format. `OtherKeys.name` stands behind either where keys are unusual.

A row with `TEXT` behind its name has the text encoders that programs were tried with in such a
file, and whether they read them; `text_encoder.text_projection` stands for itself. `STOPS` is there
if a program reads nothing of a file with text encoders. A row with
`ALPHA` behind it replaces the one before where alphas are not as usual in the format.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, lru_cache
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
UNET_ROWS = ("comfy", "kohya", "diffusers", "peft")
"""The formats of UNets that every program was tried with."""
STOPS = "!"
_NOTHING: Mapping[str, str] = MappingProxyType({})


class Loader(NamedTuple):
    """A program that reads LoRAs."""

    title: str
    version: str  # the version that was tried
    kinds: Sequence[str] = ()  # of updates that it reads; () if only plain LoRAs were tried


class OtherKeys(NamedTuple):
    """How the keys of a file differ from those that prolora writes in its format.

    Attributes:
        names: whose names a UNet's modules have, "diffusers" or "authors".
        prefix: what a UNet's modules have before their names, for example "lycoris_" in place of
            "lora_unet_"; None for the usual one.
        ends: of the key with the factor `down`: "lora.down" and, behind `.processor.`,
            "_lora.down" for diffusers before PEFT, "lora_down" in place of "lora_A"; "" for the
            usual one.
    """

    names: str = ""
    prefix: str | None = None
    ends: str = ""

    @property
    def name(self) -> str:
        """What stands behind the name of a row, for example ", diffusers' names, lora.down"."""
        prefix = "" if self.prefix is None else f"prefix {self.prefix or 'none'}"
        names = f"{self.names}' names" if self.names else ""
        return "".join(f", {part}" for part in (names, prefix, self.ends) if part)


USUAL = OtherKeys()


@cache
def known_loaders() -> dict[str, Loader]:
    """Returns id -> program; `format` takes the ids."""
    return {id_: Loader(**facts) for id_, facts in _read_table()["programs"].items()}


def name_row(
    family: Family,
    format: str,
    spelling: Spelling | None,
    swapped: bool = False,
    other: OtherKeys = USUAL,
) -> str:
    """Returns the table's row for a UNet's format or another model's spelling.

    Args:
        family: of the LoRA.
        format: of the file.
        spelling: of a transformer's modules.
        swapped: alphas are there in a format without, or missing in one that has them.
        other: what else is unusual in the format.
    """
    row = format
    if spelling is not None and not family.unet:
        same = spelling.names == "authors" and not family.authors
        row = f"{spelling.prefix}|{'diffusers' if same else spelling.names}"
    elif family.unet and format in family.spellings:
        usual = "authors" if format == "comfy" else family.spellings[format].names
        other = other._replace(names="") if other.names == usual else other
    return f"{row}{other.name}{ALPHA * swapped}"


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
    denoiser, encoders, untried = _list_parts(family, tuple(modules))
    if untried:
        return {}
    patterns = {spelled.get(name) or pattern for name, pattern in denoiser.items()}
    programs, reads, encoders_read = _look_up(family, row)
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
        elif not (left := _find_left(patterns, unread)):
            reach[program] = "whole"
        elif "!" in unread:
            reach[program] = "stops"
        else:
            reach[program] = "none" if patterns <= left else "part"
    for program, read in encoders_read.items():
        if program in reach and encoders and STOPS in read:
            reach[program] = "stops"
        elif program in reach and encoders & read.keys():
            parts: set[Reach] = {reach[program]} if patterns else set()
            parts |= {"whole" if read[one] else "none" for one in encoders & read.keys()}
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
    _, reads, encoders_read = _look_up(family, row)
    unread, read = reads.get(program), encoders_read.get(program, {})
    if program not in reads and _is_tried_by_all(family, row):
        unread = ["*"]
    if unread is None or unread == ["?"]:
        return None
    modules = list(modules)
    names = [
        name_encoder(name)
        if is_in_text_encoder(name)
        else spelled.get(name) or family.find_pattern(name) or name
        for name in modules
    ]
    if not _is_recognised(names, unread):
        unread = ["*"]
    if STOPS in read and any(map(is_in_text_encoder, modules)):
        unread, read = ["*"], {}
    gone = _find_left(names, unread)
    if unread != ["*"] and any(is_in_text_encoder(f"{n}.") and n not in read for n in names):
        return None
    left = (n for n in names if n in gone or not read.get(n, unread != ["*"]))
    return dict(Counter(left).most_common())


def find_untried(family: Family, row: str, modules: Iterable[str]) -> set[str]:
    """Returns the programs not tried with the text encoders of such a file.

    `row` comes from `name_row`; `modules` are the canonical names that the file updates.
    """
    programs, _, encoders_read = _look_up(family, row)
    encoders = {name_encoder(name) for name in modules if is_in_text_encoder(name)}
    return {
        one
        for one in programs
        if not encoders <= encoders_read.get(one, {}).keys()
        and STOPS not in encoders_read.get(one, {})
    }


@lru_cache(64)  # every program is asked about the modules of one file
def _list_parts(
    family: Family, names: tuple[str, ...]
) -> tuple[Mapping[str, str], frozenset[str], bool]:
    """Returns module of the denoiser -> its pattern, and the text encoders among the modules.

    The last is whether one of them is of a kind that no program was tried with.
    """
    denoiser = {name: pattern for name in names if (pattern := family.find_pattern(name))}
    encoders = frozenset(map(name_encoder, filter(is_in_text_encoder, names)))
    return denoiser, encoders, any(map(family.is_untried, denoiser))


def name_encoder(module: str) -> str:
    """Returns the name of a text encoder in the table, for example "text_encoder_2".

    The projection behind CLIP has its own: some programs read it under other names.
    """
    component = find_component(module)
    alone = f"{component}.text_projection"
    return alone if module == alone else component


def _look_up(family: Family, row: str) -> tuple[Any, Any, Any]:
    """Returns the programs with such models, what each leaves, and the encoders that it reads."""
    rows = _read_table()["families"].get(family.id, {"": []})
    plain = row.removesuffix(ALPHA)
    reads = rows.get(plain, {})
    if plain != row and "," not in plain and not _is_tried_by_all(family, row):
        # Rows of further prefixes were counted with the usual alphas alone.
        choosy = {x for one, of in rows.items() if one.endswith(ALPHA) for x in of}
        reads = {program: unread for program, unread in reads.items() if program not in choosy}
    return rows[""], reads | rows.get(row, {}), rows.get(plain + TEXT, {})


def _find_left(patterns: Iterable[str], unread: Collection[str]) -> set[str]:
    """Returns the patterns that are among those a program leaves."""
    listed = set(unread)
    ends = tuple(one[1:] for one in unread if one.startswith("*."))
    return {one for one in patterns if one in listed or one.endswith(ends)}


def _is_recognised(patterns: Collection[str], unread: Iterable[str]) -> bool:
    """Returns whether a file has a pattern that the program looks for, if it looks for any."""
    needed = {one[1:] for one in unread if one.startswith("+")}
    return not needed or bool(needed.intersection(patterns))


def _is_tried_by_all(family: Family, row: str) -> bool:
    """Returns whether every program that has such models was tried with a row."""
    plain = row.removesuffix(ALPHA)
    own = (name_row(family, format, one) for format, one in family.spellings.items())
    return plain in (UNET_ROWS if family.unet else {*_read_table()["rows"], *own})


@cache
def _read_table() -> dict[str, dict[str, Any]]:
    text = resources.files(__package__).joinpath("loaders.json").read_text("utf-8")
    return dict(json.loads(text))
