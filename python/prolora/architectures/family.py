"""What a family of transformers is, as data: its modules and their spellings.

One file of `families/` describes one family. Nothing else in the package knows a family by name:
reading, writing, recognition and the tables of the documentation take everything from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Literal, NamedTuple

from .layouts import load_patterns

NUMBER = "N"
"""Stands in a pattern of module names for the number of a block (or of an expert)."""

MOST_NUMBERS, LONGEST_NAME = 12, 400
"""Of a module's name; real ones have four numbers and 100 characters."""


class Fused(NamedTuple):
    """A matrix of the authors that holds the rows of several modules of diffusers, from the top.

    Attributes:
        parts: patterns of diffusers' modules.
        shares: their rows, in units: (3, 1, 1) for three times as many queries as keys and values.
    """

    parts: tuple[str, ...]
    shares: tuple[int, ...]


class Swapped(NamedTuple):
    """A matrix that makes (shift, scale) where that of diffusers makes (scale, shift).

    Attributes:
        part: pattern of diffusers' module.
        only_if_two: the halves are swapped only where the matrix makes just these two, that is
            where it has twice as many rows as columns; SD3's last block is such a place.
    """

    part: str
    only_if_two: bool = False


def fuse_equal(*parts: str) -> Fused:
    """A fused matrix whose parts have equally many rows, such as q, k and v."""
    return Fused(parts, (1,) * len(parts))


def fuse_qkv(pattern: str) -> Fused:
    """The fused matrix of queries, keys and values, whose names have q, k and v in place of {}."""
    return fuse_equal(*map(pattern.format, "qkv"))


class Spelling(NamedTuple):
    """How a file spells the modules of a family.

    Attributes:
        prefix: what stands before every module's name.
        names: whose names follow: "diffusers" or "authors".
        dotted: False where underscores stand in place of the dots, as in kohya's files.
    """

    prefix: str
    names: Literal["diffusers", "authors"]
    dotted: bool = True


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
    """A matrix of the authors' checkpoint and the modules of diffusers it holds.

    Attributes:
        name: the authors' name, `double_blocks.0.img_attn.qkv`.
        parts: canonical modules, from the top; one, unless the matrix is fused.
        shares: rows of each part, in units.
        swap: whether the halves of its rows are in the other order than in diffusers: "never",
            "always", or "if two" (`Swapped.only_if_two`).
    """

    name: str
    parts: tuple[str, ...]
    shares: tuple[int, ...]
    swap: Literal["never", "always", "if two"] = "never"

    def is_swapped(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix of this shape [out, in] has its halves swapped."""
        if self.swap == "if two":
            return len(shape) == 2 and shape[0] == 2 * shape[1]
        return self.swap == "always"


@dataclass(frozen=True)
class Family:
    """Models of one class: the same modules, at one or several sizes.

    Attributes:
        id: for programs, "qwen-image".
        title: for people, "Qwen-Image".
        layouts: ids of its published sizes, see `layouts.load_layout`.
        authors: the authors' (and ComfyUI's) module -> diffusers' module, or what else it holds.
            Patterns, in which N is the number of a block. A module that is not listed has the same
            name in both; empty where all have.
        aliases: other names that files have for the authors' modules -> the authors' name, or the
            modules whose rows such a matrix has. They are read and never written. The parts of a
            fused matrix counted from 0 (`img_attn.qkv.2`, OneTrainer's) need no alias.
        spellings: format -> how a file of that format spells the modules; without the formats that
            no program reads for this family.
        claims: how metadata names a member of the family (the beginning of
            `ss_base_model_version` or `modelspec.architecture`, in lower case) -> its title.
        siblings: pairs that people move LoRAs between, as sentences for the documentation.
        not_linear: pattern of a module -> what it is, where it is no plain linear layer.
        experts: whether models of it may be two, one for high noise and one for low noise.
        unet: whether it is a UNet, whose names follow from arithmetic (`ldm`) and not from tables.
    """

    id: str
    title: str
    layouts: tuple[str, ...]
    authors: Mapping[str, str | Fused | Swapped] = field(default_factory=dict)
    aliases: Mapping[str, str | Fused] = field(default_factory=dict)
    spellings: Mapping[str, Spelling] = field(default_factory=lambda: SPELLINGS)
    claims: Mapping[str, str] = field(default_factory=dict)
    siblings: tuple[str, ...] = ()
    not_linear: Mapping[str, str] = field(default_factory=dict)
    experts: bool = False
    unet: bool = False

    @cached_property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        """Pattern of a canonical module -> its shapes in the published sizes."""
        return load_patterns(self.layouts)

    def find_module(self, name: str, *, dotted: bool = True) -> str | None:
        """The canonical module that a name of diffusers means, None if the family has none such.

        Args:
            name: `transformer_blocks.0.attn.to_q`, without any prefix.
            dotted: False where `name` has underscores in place of dots.
        """
        match = _match_pattern(name, self._modules, dotted)
        return _fill_pattern(*match) if match else None

    def list_patterns(self, *, dotted: bool) -> set[str]:
        """What names that `find_module` and `find_weight` know look like."""
        both = self._modules, self._weights
        return {name for one in both for name in (one.dotted if dotted else one.underscored)}

    def find_pattern(self, module: str) -> str | None:
        """The pattern of a canonical module, None if no published size has such a module."""
        match = _match_pattern(module, self._modules, dotted=True)
        return match[0] if match else None

    def find_shapes(self, module: str) -> tuple[tuple[int, ...], ...]:
        """The shapes that a canonical module has in the published sizes, of whatever block."""
        return self.shapes.get(self.find_pattern(module) or "", ())

    def find_weight(self, name: str, *, dotted: bool = True) -> AuthorsWeight | None:
        """The authors' weight of that name or alias, None if the family has none such.

        Args:
            name: `double_blocks.0.img_attn.qkv`, without any prefix.
            dotted: False where `name` has underscores in place of dots.
        """
        match = _match_pattern(name, self._weights, dotted)
        return self._make_weight(*match) if match else None

    def find_weight_holding(self, module: str) -> AuthorsWeight | None:
        """The authors' weight that a canonical module is, or is rows of."""
        match = _match_pattern(module, self._holders, dotted=True)
        return self._make_weight(*match) if match else None

    def _make_weight(self, pattern: str, numbers: tuple[str, ...]) -> AuthorsWeight:
        """The weight of a pattern of the authors with its numbers filled in."""
        entry = self._entries[pattern]
        if isinstance(entry, Fused):
            parts, shares = entry
        else:
            parts, shares = (entry.part if isinstance(entry, Swapped) else entry,), (1,)
        swap: Literal["never", "always", "if two"] = "never"
        if isinstance(entry, Swapped):
            swap = "if two" if entry.only_if_two else "always"
        filled = tuple(_fill_pattern(part, numbers) for part in parts)
        return AuthorsWeight(_fill_pattern(pattern, numbers), filled, shares, swap)

    @cached_property
    def _holders(self) -> _Patterns:
        """Canonical patterns -> the authors' pattern that holds them."""
        listed = {part: name for name, entry in self.authors.items() for part in list_parts(entry)}
        return _Patterns({name: name for name in self.shapes} | listed)

    @cached_property
    def _modules(self) -> _Patterns:
        """Patterns of all canonical modules."""
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
        return entries | same | dict(self.authors)

    @cached_property
    def _weights(self) -> _Patterns:
        """Names that files have for the authors' weights -> the authors' pattern."""
        aliases = {name: to for name, to in self.aliases.items() if isinstance(to, str)}
        return _Patterns({name: name for name in self._entries} | aliases)


class _Patterns:
    """Patterns of names, looked up by a name with numbers, dotted or underscored."""

    def __init__(self, meanings: Mapping[str, str]) -> None:
        self.dotted = dict(meanings)
        self.underscored = {name.replace(".", "_"): meanings[name] for name in meanings}


def _match_pattern(
    name: str, patterns: _Patterns, dotted: bool
) -> tuple[str, tuple[str, ...]] | None:
    """(what the pattern of a name means, the numbers in its places); None if there is none.

    A number may be the place of a block or part of a name (`net.0`), so that every choice of up to
    two numbers is tried; that of the first number alone is nearly always the right one.
    """
    separator, table = (".", patterns.dotted) if dotted else ("_", patterns.underscored)
    for trial, numbers in list_trials(name, separator):
        meaning = table.get(trial)
        if meaning is not None:
            return meaning, numbers
    return None


@lru_cache(1 << 12)  # every name is looked up in several families
def list_trials(name: str, separator: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The patterns that a name may have, each with the numbers in its places."""
    words = name[: LONGEST_NAME + 1].split(separator)
    places = [i for i, word in enumerate(words) if word.isascii() and word.isdecimal()]
    if NUMBER in words or len(name) > LONGEST_NAME or len(places) > MOST_NUMBERS:
        return ()  # a pattern, or what somebody made up: trials grow with the square of the numbers
    trials = []
    for chosen in _choose_places(places):
        trial = list(words)
        for place in chosen:
            trial[place] = NUMBER
        trials.append((separator.join(trial), tuple(words[place] for place in chosen)))
    return tuple(trials)


def _choose_places(places: list[int]) -> Iterator[tuple[int, ...]]:
    """The first place, none, then every other one and every two."""
    yield tuple(places[:1])
    if places:
        yield ()
    yield from ((place,) for place in places[1:])
    yield from itertools.combinations(places, 2)


def _fill_pattern(pattern: str, numbers: tuple[str, ...]) -> str:
    """The pattern with numbers in its places."""
    words, left = pattern.split("."), iter(numbers)
    return ".".join(next(left) if word == NUMBER else word for word in words)


def list_parts(entry: str | Fused | Swapped) -> tuple[str, ...]:
    """The patterns of diffusers' modules that an entry of `Family.authors` holds."""
    if isinstance(entry, Fused):
        return entry.parts
    return (entry.part if isinstance(entry, Swapped) else entry,)
