"""What a family of transformers is, as data: its modules and their spellings.

The files of `families/` describe them. Nothing else in the package knows a family by name:
reading, writing, recognition and the tables of the documentation take everything from there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from types import MappingProxyType
from typing import Generic, Literal, NamedTuple, TypeVar

from .layouts import load_patterns
from .modules import is_linear

Meaning = TypeVar("Meaning")

NUMBER = "N"
"""Stands in a pattern of module names for the number of a block (or of an expert)."""

MOST_NUMBERS, LONGEST_NAME = 12, 400
"""Of a module's name; real ones have four numbers and 100 characters."""


class Fused(NamedTuple):
    """A matrix of the authors with the rows of several diffusers modules."""

    parts: tuple[str, ...]  # patterns of diffusers' modules, from the top
    # Their rows, in units: (3, 1, 1) for three times as many queries as keys and values
    shares: tuple[int, ...]


class Swapped(NamedTuple):
    """A matrix that makes (shift, scale), and (scale, shift) in diffusers."""

    part: str  # pattern of diffusers' module
    # Swap only where the matrix makes just these two: twice as many rows as columns. SD3's last
    # block is such a case.
    only_if_two: bool = False


def fuse_equal(*parts: str) -> Fused:
    """Returns a fused matrix whose parts have equally many rows: q, k, v."""
    return Fused(parts, (1,) * len(parts))


def fuse_qkv(pattern: str) -> Fused:
    """Returns the fused matrix of q, k and v, which replace {} in the pattern."""
    return fuse_equal(*map(pattern.format, "qkv"))


# What diffusers makes of separate projections that read the same features (`fuse_projections`);
# trainers save LoRAs on these.
_FUSED_PROJECTIONS = {
    "to_q": ("to_qkv", ("to_q", "to_k", "to_v")),
    "to_k": ("to_kv", ("to_k", "to_v")),
    "add_q_proj": ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
}


Variant = Literal["diffusers", "authors", "alias", "part", "fused"]
"""Whose name a module has in a file. For the queries of a block of HunyuanVideo, for example:

* "diffusers": `transformer_blocks.0.attn.to_q`;
* "authors": `double_blocks.0.img_attn.qkv`, the name in ComfyUI's checkpoint;
* "alias": `double_blocks.0.img_attn_qkv`, another name of the same weight (`Family.aliases`);
* "part": `double_blocks.0.img_attn.qkv.0`, a part of a fused weight, counted from 0;
* "fused": `transformer_blocks.0.attn.to_qkv`, as diffusers' `fuse_projections` names it.
"""


class Spelling(NamedTuple):
    """How a file spells the modules of a family."""

    prefix: str  # stands before every module's name
    names: Variant  # whose names follow; "part" and "fused" are read and never written
    dotted: bool = True  # False where underscores replace the dots, as in kohya's files


COMFY = Spelling("diffusion_model.", "authors")
KOHYA = Spelling("lora_unet_", "authors", dotted=False)
DIFFUSERS = Spelling("transformer.", "diffusers")
PEFT = Spelling("base_model.model.", "diffusers")
UNET = Spelling("unet.", "diffusers")
UNET_KOHYA = Spelling("lora_unet_", "diffusers", dotted=False)
SPELLINGS: Mapping[str, Spelling] = MappingProxyType(
    {"comfy": COMFY, "kohya": KOHYA, "diffusers": DIFFUSERS, "peft": PEFT}
)
"""Format -> spelling, as most families have them."""


class AuthorsWeight(NamedTuple):
    """A matrix of the authors' checkpoint and the diffusers modules in it."""

    name: str  # the authors' name, `double_blocks.0.img_attn.qkv`
    parts: tuple[str, ...]  # canonical modules, from the top; one, unless the matrix is fused
    shares: tuple[int, ...]  # rows of each part, in units
    # Are the halves of its rows in the other order than in diffusers? See `Swapped`.
    swap: Literal["never", "always", "if two"] = "never"
    variant: Variant = "authors"  # how the file spelled it; `name` is the authors' own
    # The pattern of the name in the file unless that is the authors': `double_blocks.N.img_attn_q`
    spelled: str = ""

    def split_rows(self, height: int) -> tuple[int, ...]:
        """Returns the rows of each part of a matrix [height, n]; () if they do not divide."""
        unit, rest = divmod(height, sum(self.shares))
        if rest or not unit or (self.swap == "always" and height % 2):
            return ()
        return tuple(share * unit for share in self.shares)

    def is_swapped(self, shape: tuple[int, ...]) -> bool:
        """Returns whether a matrix [out, in] of this shape has its halves swapped."""
        if self.swap == "if two":
            return len(shape) == 2 and shape[0] == 2 * shape[1]
        return self.swap == "always"


@dataclass(frozen=True, eq=False)
class Family:
    """Models of one class: the same modules, at one or several sizes."""

    id: str  # for programs, "qwen-image"
    title: str  # for people, "Qwen-Image"
    layouts: tuple[str, ...]  # ids of its published sizes, see `layouts.load_layout`
    # The authors' (and ComfyUI's) module -> diffusers' module, or what else it holds. Patterns, in
    # which N is the number of a block. A module that is not listed has the same name in both.
    authors: Mapping[str, str | Fused | Swapped] = field(default_factory=dict)
    # Other names of the authors' modules -> the authors' name, or the modules whose rows such a
    # matrix has. They are written for a program that reads no others. The parts of a fused matrix
    # counted from 0 (`img_attn.qkv.2`, OneTrainer's) need no alias.
    aliases: Mapping[str, str | Fused] = field(default_factory=dict)
    # Format -> how a file of that format spells the modules; without the formats that no program
    # reads for this family.
    spellings: Mapping[str, Spelling] = field(default_factory=lambda: SPELLINGS)
    # How metadata names a member of the family (the beginning of `ss_base_model_version` or
    # `modelspec.architecture`, in lower case) -> its title.
    claims: Mapping[str, str] = field(default_factory=dict)
    experts: bool = False  # may there be two models, for high and for low noise?
    # A family with modules of the same names and sizes: what fits both is taken for that one's
    rarer_than: str = ""
    untried: tuple[str, ...] = ()  # beginnings of modules that no program was tried with
    # Title -> sizes, where programs load the sizes by different code
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unet: bool = False  # names follow from arithmetic (`ldm`), not from tables
    # The aliases that its trainers use, which are the ones written; () for all
    written_aliases: tuple[str, ...] = ()

    @classmethod
    def of_names(
        cls, id_: str, *names: str, aliases: Mapping[str, str] = MappingProxyType({})
    ) -> Family:
        """Returns modules of no published sizes, whose names are the authors' own."""
        return cls(id_, id_, (), {name: name for name in names}, aliases)

    @cached_property
    def as_loaded(self) -> tuple[Family, ...]:
        """Its groups of sizes, each as a family; itself where it has none."""
        return tuple(
            replace(self, id=title.lower(), title=title, layouts=sizes, groups={})
            for title, sizes in self.groups.items()
        ) or (self,)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        """Pattern of a canonical module -> its shapes in the published sizes."""
        return load_patterns(self.layouts)

    def find_module(self, name: str, *, dotted: bool = True) -> str | None:
        """Returns the canonical module for a name without prefix, None if unknown.

        `dotted` is False where `name` has underscores in place of dots.
        """
        match = _match_pattern(name, self._modules, dotted)
        return _fill_pattern(*match) if match else None

    def list_patterns(self, *, dotted: bool) -> set[str]:
        """Returns the patterns of all names that `find_module` and `find_weight` know."""
        both = self._modules, self._weights
        return {name for one in both for name in (one.dotted if dotted else one.underscored)}

    def find_pattern(self, module: str) -> str | None:
        """Returns the pattern of a canonical module, None if no published size has it."""
        return next((trial for trial, _ in list_trials(module, ".") if trial in self.shapes), None)

    def is_untried(self, module: str) -> bool:
        """Returns whether no program was tried with a canonical module.

        Programs are tried with layers. A table or an embedding is a parameter of a larger module
        in some programs, which then look for it under another key.
        """
        pattern = str(self.find_pattern(module))
        tables = [shape for shape in self.find_shapes(module) if len(shape) == 2]
        return pattern.startswith(self.untried) or any(
            not is_linear(pattern, shape) for shape in tables
        )

    def find_shapes(self, module: str) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of a canonical module in the published sizes, of any block."""
        return self.shapes.get(self.find_pattern(module) or "", ())

    def find_weight(self, name: str, *, dotted: bool = True) -> AuthorsWeight | None:
        """Returns the authors' weight with that name or alias, None if unknown.

        `name` has no prefix; `dotted` is False where it has underscores in place of dots.
        """
        match = _match_pattern(name, self._weights, dotted)
        if match is None:
            return None
        (pattern, variant, spelled), numbers = match
        weight = self._make_weight(pattern, numbers)
        if variant == "authors":
            return weight
        return weight._replace(variant=variant, spelled=spelled)

    def find_weight_holding(self, module: str) -> AuthorsWeight | None:
        """Returns the authors' weight that is a canonical module or has its rows."""
        match = _match_pattern(module, self._holders, dotted=True)
        return self._make_weight(*match) if match else None

    def find_alias(self, module: str) -> AuthorsWeight | None:
        """Returns the weight that contains a canonical module, under its alias.

        For example `transformer_blocks.0.attn.to_q` -> `double_blocks.0.img_attn_q` for
        HunyuanVideo 1.5. None if no alias is written for it. Of several aliases, the one with the
        fewest parts: a LoRA of only the queries then needs no zeros for keys and values.
        """
        match = _match_pattern(module, self._aliases, dotted=True)
        if match is None:
            return None
        pattern, numbers = match
        weight = self._make_weight(self._weights.dotted[pattern][0], numbers)
        return weight._replace(
            name=_fill_pattern(pattern, numbers), variant="alias", spelled=pattern
        )

    def is_alike(self, module: str, *, dotted: bool = True) -> bool:
        """Returns whether a canonical module has the same name in diffusers' and authors' files.

        `dotted` is False for files with underscores in place of dots, where for example
        `time_embedding.linear_1` and `time_embedding_linear_1` are the same.
        """
        match = _match_pattern(module, self._modules, dotted=True)
        own = match[0] if match else ""
        holder = self._holders.dotted.get(own, "")
        same = holder == own if dotted else holder.replace(".", "_") == own.replace(".", "_")
        return same and self.authors.get(own, own) == own

    def list_variant(self, variant: Variant) -> dict[str, Fused]:
        """Returns pattern in files -> its modules, for all names of one variant.

        A weight may have several aliases. Weights that hold one module have it as their only part.
        """
        if variant == "diffusers":
            return {pattern: Fused((pattern,), (1,)) for pattern in self.shapes}
        entries = {
            pattern: self._entries[meaning]
            for pattern, (meaning, own, _) in self._weights.dotted.items()
            if own == variant
        }
        return {
            pattern: entry if isinstance(entry, Fused) else Fused(list_parts(entry), (1,))
            for pattern, entry in entries.items()
        }

    def _make_weight(self, pattern: str, numbers: tuple[str, ...]) -> AuthorsWeight:
        """Fills the numbers of blocks into an authors' pattern."""
        entry = self._entries[pattern]
        shares = entry.shares if isinstance(entry, Fused) else (1,)
        swap: Literal["never", "always", "if two"] = "never"
        if isinstance(entry, Swapped):
            swap = "if two" if entry.only_if_two else "always"
        filled = tuple(_fill_pattern(part, numbers) for part in list_parts(entry))
        return AuthorsWeight(_fill_pattern(pattern, numbers), filled, shares, swap)

    @cached_property
    def _holders(self) -> _Patterns[str]:
        """Canonical patterns -> the authors' pattern that holds them."""
        listed = {part: name for name, entry in self.authors.items() for part in list_parts(entry)}
        return _Patterns({name: name for name in self.shapes} | listed)

    @cached_property
    def _aliases(self) -> _Patterns[str]:
        """Canonical patterns -> the alias that contains them."""
        every, chosen = self.list_variant("alias"), self.written_aliases
        aliases = {name: every[name] for name in chosen or every}
        longest_first = sorted(aliases, key=lambda name: -len(aliases[name].parts))
        return _Patterns({part: name for name in longest_first for part in aliases[name].parts})

    @cached_property
    def _modules(self) -> _Patterns[str]:
        return _Patterns({name: name for name in self._holders.dotted})

    @cached_property
    def _entries(self) -> dict[str, str | Fused | Swapped]:
        """All patterns of the authors, and of parts of their matrices -> what they hold."""
        entries: dict[str, str | Fused | Swapped] = {}
        for pattern, entry in (*self.authors.items(), *self.aliases.items()):
            if isinstance(entry, Fused):
                entries |= {f"{pattern}.{i}": part for i, part in enumerate(entry.parts)}
                entries[pattern] = entry
        same = {own: own for own, holder in self._holders.dotted.items() if own == holder}
        return self._list_fused() | entries | same | dict(self.authors)

    def _list_fused(self) -> dict[str, str | Fused | Swapped]:
        """Returns the fused projections that diffusers can make -> their parts."""
        entries: dict[str, str | Fused | Swapped] = {}
        for pattern in self.shapes:
            stem, dot, first = pattern.rpartition(".")
            if not dot or first not in _FUSED_PROJECTIONS:
                continue
            fused, names = _FUSED_PROJECTIONS[first]
            parts = tuple(f"{stem}.{name}" for name in names)
            shapes = [self.shapes[part][0] for part in parts if part in self.shapes]
            alike = len({shape[1:] for shape in shapes}) == 1
            if alike and len(shapes) == len(parts):
                unit = math.gcd(*(shape[0] for shape in shapes))
                entries[f"{stem}.{fused}"] = Fused(parts, tuple(x[0] // unit for x in shapes))
        return entries

    @cached_property
    def _weights(self) -> _Patterns[tuple[str, Variant, str]]:
        """Patterns of names in files -> (the authors' pattern, the variant, the pattern itself).

        The third is needed for names with underscores, which do not show their dots.
        """
        fused, same = self._list_fused(), self._holders.dotted
        known: dict[str, tuple[str, Variant, str]] = {}
        for name in self._entries:
            variant: Variant = "fused" if name in fused else "part"
            if name in self.aliases:
                variant = "alias"
            if name in self.authors or same.get(name) == name:
                variant = "authors"
            known[name] = name, variant, name
        for name, meaning in self.aliases.items():
            known[name] = (meaning if isinstance(meaning, str) else name), "alias", name
        return _Patterns(known)


class _Patterns(Generic[Meaning]):
    """Patterns of names, for names with numbers, dotted or underscored."""

    def __init__(self, meanings: Mapping[str, Meaning]) -> None:
        self.dotted = dict(meanings)

    @cached_property
    def underscored(self) -> dict[str, Meaning]:
        """The first of two names counts: authors' names come before aliases."""
        pairs = reversed(self.dotted.items())
        return {name.replace(".", "_"): meaning for name, meaning in pairs}


def _match_pattern(
    name: str, patterns: _Patterns[Meaning], dotted: bool
) -> tuple[Meaning, tuple[str, ...]] | None:
    """Returns the meaning of a name's pattern and its numbers, None if unknown."""
    table = patterns.dotted if dotted else patterns.underscored
    for trial, numbers in list_trials(name, "." if dotted else "_"):
        meaning = table.get(trial)
        if meaning is not None:
            return meaning, numbers
    return None


@lru_cache(1 << 15)  # every name is looked up in several families
def list_trials(name: str, separator: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns the patterns that a name may have, each with the numbers it replaces."""
    words = name[: LONGEST_NAME + 1].split(separator)
    places = [i for i, word in enumerate(words) if word.isdecimal() and word.isascii()]
    if NUMBER in words or len(name) > LONGEST_NAME or len(places) > MOST_NUMBERS:
        return ()  # a pattern, or what somebody made up: trials grow with the square of the numbers
    trials: list[tuple[str, tuple[str, ...]]] = [(name, ())]
    # The first number, each other one, every two
    for chosen in (*((place,) for place in places), *itertools.combinations(places, 2)):
        trial = words.copy()
        for place in chosen:
            trial[place] = NUMBER
        trials.append((separator.join(trial), tuple(words[place] for place in chosen)))
    return tuple(trials)


def _fill_pattern(pattern: str, numbers: tuple[str, ...]) -> str:
    return _as_template(pattern).format(*numbers)


@cache
def _as_template(pattern: str) -> str:
    """Turns a pattern into a format string: filled in for every name of every file."""
    return ".".join("{}" if word == NUMBER else word for word in pattern.split("."))


def list_parts(entry: str | Fused | Swapped) -> tuple[str, ...]:
    """Returns the patterns of diffusers' modules in an entry of `Family.authors`."""
    if isinstance(entry, Fused):
        return entry.parts
    return (entry.part if isinstance(entry, Swapped) else entry,)
