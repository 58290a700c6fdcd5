"""Programs that read LoRA files, and their best formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ...architectures import loaders
from ...architectures.families import loaded_families
from ...architectures.family import Family, Spelling
from ...architectures.modules import is_in_text_encoder
from ...errors import UnsupportedFormat
from ..key_groups import Slot
from ..keys import tensor_keys
from ..keys.codec import Codec, cut_prefix

PLAIN = "lora", "locon", "norm"
"""Kinds of update that all programs were tried with."""
NAMED = "lora named default"
"""A kind of update: a LoRA whose keys hold PEFT's name of the adapter, `lora_A.default.weight`."""
_FURTHER = (
    Spelling("diffusion_model.", "diffusers"),
    Spelling("", "diffusers"),
)
"""Spellings that no format of ours has by itself and a program may want."""


class Readers(NamedTuple):
    """Titles of programs by how much they read of a LoRA file.

    A program that has no such model, or was not tried with such a file, is in none of them.
    """

    whole: tuple[str, ...] = ()  # read all of it
    part: tuple[str, ...] = ()  # read some of it, and say little or nothing about the rest
    none: tuple[str, ...] = ()  # have such models and read nothing of this file
    untried: tuple[str, ...] = ()  # of the readers: programs not tried with its text encoders

    def __str__(self) -> str:
        """Describes who reads all of the file, a part or nothing."""
        parts = [
            f"read by {', '.join(self.whole)}" if self.whole else "",
            f"in part by {', '.join(self.part)}" if self.part else "",
            f"not by {', '.join(self.none)}" if self.none else "",
            f"with its text encoders not tried: {', '.join(self.untried)}" if self.untried else "",
        ]
        return "; ".join(filter(None, parts))


class FileNames(NamedTuple):
    """How a file spells its modules."""

    format: str
    spelling: Spelling | None = None  # the most common one; None for a UNet
    # Module -> its spelling and the pattern of its name (`AuthorsWeight.spelled`), for modules that
    # have another spelling, for example `transformer_blocks.0.ff.net.0.proj` ->
    # (alias behind `lora_unet_`, `double_blocks.N.img_mlp.fc1`)
    others: Mapping[str, tuple[Spelling, str]] = MappingProxyType({})
    swapped: bool = False  # as in `loaders.name_row`, and below
    other: loaders.OtherKeys = loaders.USUAL

    @classmethod
    def of_slots(cls, slots: Sequence[Slot], format: str, spelling: Spelling | None) -> FileNames:
        """Returns the names of the updates in a file; `spelling` is the most common one."""
        alphas = {"alpha" in slot.keys for slot in slots if slot.form.rank and not slot.peft}
        others = {
            name: (own, slot.module.matrix.spelled if slot.module.matrix else "")
            for slot in slots
            if (own := slot.module.own_spelling) and own != spelling
            for name in slot.module.modules
        }
        return cls(
            format, spelling, others, (format != "kohya") in alphas, _find_other(slots, format)
        )

    @classmethod
    def as_written(
        cls, family: Family, format: str, spelling: Spelling | None, modules: Iterable[str]
    ) -> FileNames:
        """Returns the names of a file that is written; a spelling of None is the format's own."""
        spelling = spelling or family.spellings.get(format)
        if spelling is None or spelling.names != "alias":
            return cls(format, spelling)
        plain = spelling._replace(names="authors"), ""
        aliases = {name: family.find_alias(name) for name in modules}
        others = {n: (spelling, one.spelled) if one else plain for n, one in aliases.items()}
        return cls(format, spelling, others)

    def list_rows(self, family: Family, modules: Iterable[str]) -> dict[str, list[str]]:
        """Groups the modules of a file by their row in the table of programs."""
        usual = self._name_row(family, self.spelling)
        if not self.others:
            return {usual: list(modules)}
        rows: dict[str, list[str]] = {}
        for name in modules:
            other = self.others.get(name)
            row = self._name_row(family, other[0]) if other else usual
            rows.setdefault(row, []).append(name)
        return rows or {usual: []}

    def _name_row(self, family: Family, spelling: Spelling | None) -> str:
        return loaders.name_row(family, self.format, spelling, self.swapped, self.other)

    @property
    def patterns(self) -> dict[str, str]:
        """Module -> the pattern of its name in the file, for aliases, parts and fused names."""
        return {name: pattern for name, (_, pattern) in self.others.items() if pattern}


_USUAL_PREFIXES = {"kohya": "lora_unet_", "comfy": "diffusion_model.", "diffusers": "unet."}


def _find_other(slots: Sequence[Slot], format: str) -> loaders.OtherKeys:
    """Returns how the keys of a file differ from those that prolora writes in its format."""
    names, prefix, ends = "", None, ""
    for slot in slots:
        path, _ = tensor_keys.split_key(next(iter(slot.keys.values())))
        if slot.module.spelling is None and not is_in_text_encoder(slot.module.name):
            names = "authors" if slot.module.sgm or names == "authors" else "diffusers"
            cut = cut_prefix(path)
            usual = _USUAL_PREFIXES.get(format)
            if prefix is None and usual and cut is not None and cut.prefix != usual:
                prefix = cut.prefix
        if key := slot.keys.get("down", ""):
            is_old = key.endswith(("_lora.down.weight", ".lora.down.weight"))
            dotted = key.endswith(".lora_down.weight") and format != "kohya"
            ends = "lora.down" if is_old else "lora_down" if dotted else ends
            ends = "_lora.down" if ".processor." in key and is_old else ends
    return loaders.OtherKeys(names, prefix, ends)


def find_readers(
    families: Iterable[str], names: FileNames, modules: Collection[str] = ()
) -> Readers:
    """Returns how much each tried program reads of a LoRA file.

    A program that reads all of the file for some of the models is titled "ComfyUI (as PixArt)".
    A program that was not tried with every spelling in the file is in none of the lists.

    Args:
        families: ids of the families that the LoRA can belong to, as in `list_loaded`.
        names: of the modules in the file.
        modules: canonical names of the modules that the file updates.
    """
    tables = _known(families)
    of_each = [combine_reach(one, names, modules) for one in tables]
    encoders_untried = {
        program
        for one in tables
        for row, of in names.list_rows(one, modules).items()
        for program in loaders.find_untried(one, row, of)
    }
    readers: dict[loaders.Reach, list[str]] = {"whole": [], "part": [], "none": []}
    untried = []
    for id_, loader in loaders.known_loaders().items():
        amounts = [reach.get(id_) for reach in of_each]
        able = [one.title for one, x in zip(tables, amounts, strict=True) if x == "whole"]
        amount, title = amounts[0] if len({*amounts}) == 1 else None, loader.title
        if amount is None and able:
            amount, title = "whole", f"{loader.title} (as {' or '.join(able)})"
        if amount is not None:
            readers[amount].append(title)
            if amount != "none" and id_ in encoders_untried:
                untried.append(title)
    whole, part, none = (tuple(readers[amount]) for amount in ("whole", "part", "none"))
    return Readers(whole, part, none, tuple(untried))


def combine_reach(
    family: Family, names: FileNames, modules: Iterable[str]
) -> dict[str, loaders.Reach]:
    """Returns program -> how much it reads of a file: "whole", "part" or "none".

    A program that was not tried with every spelling in the file is missing.
    """
    rows = names.list_rows(family, modules)
    of_each = [loaders.find_reach(family, row, some, names.patterns) for row, some in rows.items()]
    reach: dict[str, loaders.Reach] = {}
    for program in loaders.list_programs(family.id):
        if any(of.get(program) == "stops" for of in of_each):
            reach[program] = "none"
        elif all(program in of for of in of_each):
            amounts = {of[program] for of in of_each}
            reach[program] = amounts.pop() if len(amounts) == 1 else "part"
    return reach


def choose_format(
    families: Iterable[str], program: str, modules: Collection[str] = ()
) -> tuple[str, Spelling | None]:
    """Returns the format and spelling that a program reads best for a family.

    Among equals, the one that most programs read whole. A spelling of None is the format's own.

    `program` is a key of `known_loaders()`; the others are as for `find_readers`.

    Raises:
        UnsupportedFormat: it reads none of our formats for the family, or nothing is known of it.
    """
    title = loaders.known_loaders()[program].title
    tables = _known(families)
    if not tables:
        raise UnsupportedFormat(
            f"which files {title} reads for this model is not known, because prolora does not know "
            "its family; name a format (`format`)"
        )
    best = rank_formats(tables, modules, program)
    if not best:  # it may have some of these models alone
        able = [family for family in tables if rank_formats([family], modules, program)]
        best = rank_formats(able, modules, program) if able else []
    if not best:
        titles = " or ".join(family.title for family in tables)
        if len(tables) > 1:
            raise UnsupportedFormat(
                f"the LoRA's names fit several models ({titles}), and {title} reads no one file "
                "for all of them; give its base model, too: `convert()` takes it as an argument "
                "after the LoRA, `merge()` as `target`"
            )
        readers = [
            loader.title
            for id_, loader in loaders.known_loaders().items()
            if rank_formats(tables, modules, id_)
        ]
        if alone := [name for name in modules if tables[0].is_untried(name)]:
            raise UnsupportedFormat(
                f"{title} was not tried with LoRAs for {titles} that change {alone[0]}; name a "
                f"format instead: `format='{next(iter(tables[0].spellings))}'`"
            )
        if program not in loaders.list_programs(tables[0].id):
            raise UnsupportedFormat(
                f"{title} was not tried with LoRAs for {titles}, and may have no such model; name "
                f"a format instead: `format='{next(iter(tables[0].spellings))}'`"
            )
        raise UnsupportedFormat(
            f"{title} reads no LoRA for {titles} that prolora writes; programs that do: "
            f"{', '.join(readers) or 'none that was tried'}"
        )
    return best[0]


def rank_formats(
    families: Collection[Family], modules: Collection[str], program: str | None = None
) -> list[tuple[str, Spelling | None]]:
    """Lists our formats that a program reads (None: any program), best first.

    A program may read all of a spelling that no format of the family has by itself. `modules` are
    the canonical names of the modules that the file updates.
    """
    first = next(iter(families))
    choices: list[tuple[str, Spelling | None]] = [(format, None) for format in first.spellings]
    if not first.unet:
        choices += [("comfy" if one.prefix else "diffusers", one) for one in _FURTHER]
    ranked = _rank(choices, families, modules, program)
    if program is not None and not any(whole for whole, _ in ranked.values()):
        rare = [(_name_format(one), one) for one in loaders.list_spellings(first)]
        ranked |= {
            choice: score
            for choice, score in _rank(rare, families, modules, program).items()
            if score[0]
        }

    def rate(choice: tuple[str, Spelling | None]) -> tuple[bool, bool, int]:
        whole, count = ranked[choice]
        return whole, choice[0] != "peft", count  # a folder, where the others are files

    return sorted(ranked, key=rate, reverse=True)


def _rank(
    choices: Iterable[tuple[str, Spelling | None]],
    families: Collection[Family],
    modules: Collection[str],
    program: str | None,
) -> dict[tuple[str, Spelling | None], tuple[bool, int]]:
    """Returns how well each choice is read: wholly by the program, by how many wholly."""
    scores: dict[tuple[str, Spelling | None], tuple[bool, int]] = {}
    for format, spelling in choices:
        amounts = []
        for family in families:
            names = FileNames.as_written(family, format, spelling, modules)
            amounts.append(combine_reach(family, names, modules))
        wanted = [reach.get(program) for reach in amounts] if program else []
        whole = sum(
            all(reach.get(id_) == "whole" for reach in amounts) for id_ in loaders.known_loaders()
        )
        if all(amount in ("whole", "part") for amount in wanted) and (program or whole):
            scores[format, spelling] = all(amount == "whole" for amount in wanted), whole
    return scores


def _name_format(spelling: Spelling) -> str:
    """Returns the format whose tensors files in a spelling have."""
    if not spelling.dotted:
        return "kohya"
    return "comfy" if spelling.prefix == "diffusion_model." else "diffusers"


def _known(families: Iterable[str]) -> list[Family]:
    return [one for id_ in families if (one := loaded_families().get(id_)) is not None]


def have_other_names(
    spelled: Sequence[tuple[Spelling, Family]], format: str, names: Iterable[str]
) -> bool:
    """Returns whether modules have different names in a format, in several models' files."""
    # Diffusers' names are those of the modules, whatever the family.
    if len({one for one, _ in spelled}) == 1 and spelled[0][0].names == "diffusers":
        return False
    codecs = [Codec(family, format=format, spelling=one) for one, family in spelled]
    every = list(names)
    return len(codecs) > 1 and len({tuple(map(codec.write, every)) for codec in codecs}) > 1


def is_read_after(families: Collection[str], program: str | None, modules: Collection[str]) -> bool:
    """Returns whether a program reads all of a file that was converted for it."""
    try:
        if program is None:
            return False
        format, spelling = choose_format(families, program, modules)
    except UnsupportedFormat:
        return False
    tables = _known(families)
    spelled = [(spelling or one.spellings[format], one) for one in tables]
    outside = [name for name in modules if not is_in_text_encoder(name)]
    if not tables[0].unet and have_other_names(spelled, format, outside):
        return False
    names = FileNames.as_written(tables[0], format, spelling, modules)
    readers = find_readers(families, names, modules)
    return loaders.known_loaders()[program].title in {*readers.whole} - {*readers.untried}


def ask_programs(
    slots: Sequence[Slot],
    families: tuple[str, ...],
    spelled: tuple[str, Spelling | None],
    modules: Collection[str],
    program: str | None,
) -> tuple[Readers, dict[str, int] | None]:
    """Returns who reads how much of a file, and what one program skips.

    `slots` are the updates of the file, `spelled` its format and spelling; `program` is a key of
    `known_loaders()`, or None. The others are as for `find_readers`.
    """
    names = FileNames.of_slots(slots, *spelled)
    readers = find_readers(families, names, modules)
    if any(slot.module.unwritten for slot in slots):  # programs were tried with what is written
        readers = readers._replace(untried=readers.whole + readers.part)
    kinds = {slot.kind for slot in slots} - {*PLAIN}
    tried = loaders.known_loaders().values()
    if not kinds <= {kind for one in tried for kind in one.kinds}:
        return Readers(), None
    if kinds:
        reads = {x.title: kinds <= {*x.kinds} for x in tried if x.kinds}
        whole, part = (tuple(filter(reads.get, some)) for some in readers[:2])
        lost = tuple(x for x in readers.whole + readers.part if reads.get(x) is False)
        mixed = lost if any(slot.kind in PLAIN for slot in slots) else ()
        none = readers.none if mixed else lost + readers.none
        readers = Readers(whole, part + mixed, none, readers.untried)
    if adapter_names := {
        tensor_keys.find_adapter_name(slot.keys.get("down", "")) for slot in slots
    } - {""}:
        able = {x.title for x in tried if adapter_names == {"default"} and NAMED in x.kinds}
        readers = Readers(*(tuple(filter(able.__contains__, some)) for some in readers))
    if program is None or len(families) != 1:
        return readers, None
    family, skipped = loaded_families()[families[0]], Counter[str]()
    for row, some in names.list_rows(family, modules).items():
        counts = loaders.count_skipped(family, row, some, program, names.patterns)
        if counts is None:
            return readers, None
        skipped.update(counts)
    return readers, dict(skipped.most_common())
