"""Strength by block, in the notation of block weights: which factor every module gets.

Either a number for each block in the order of depth, as sd-webui-lora-block-weight takes them
("1,0,0,0,1,1,1,1,1,1,1,1"), or names with their numbers ("IN04-IN08=0.5, OUT*=0",
"transformer_blocks.0-9=0.5", "double_blocks.*=0.5"). The last name that fits a module decides; what
none fits keeps its strength.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..adapters.adapter import Adapter
from ..architectures.depth import BASE, MIDDLE, DepthTable
from ..architectures.families import known_families
from ..architectures.layouts import load_layout
from ..bases import Base
from ..core.lowrank import LowRank
from ..errors import InvalidOption

Blocks = str | Sequence[float] | Mapping[str, float]
"""Factors by block: a text in either form, the numbers, or {name: factor}."""

LARGEST_FACTOR = 1e6
_PLACE = re.compile(r"(?:IN|OUT|M|MID|D|S)\d*|BASE|CLIP|T5", re.IGNORECASE)
_RANGE = re.compile(r"(.+)\.(\d{1,6})-(\d{1,6})")
_MOST_FACTORS = 4096


@dataclass(frozen=True)
class BlockWeights:
    """Factors by block, as they were asked for."""

    numbers: tuple[float, ...] = ()  # one for each block; empty where names are given
    named: tuple[tuple[str, float], ...] = ()  # (name, factor), in order

    @classmethod
    def read(cls, blocks: Blocks) -> BlockWeights:
        """Reads what was asked for and checks its form.

        Raises:
            InvalidOption: it is neither numbers nor names with numbers.
        """
        if isinstance(blocks, Mapping):
            return cls(named=tuple((str(name), _read_factor(x)) for name, x in blocks.items()))
        if not isinstance(blocks, str | Sequence):
            raise InvalidOption(f"`blocks` must be numbers or names with numbers, not {blocks!r}")
        if not isinstance(blocks, str):
            return cls(tuple(map(_read_factor, blocks)))
        items = [item.strip() for item in blocks.split(",")]
        if not all(items) or len(items) > _MOST_FACTORS:
            raise InvalidOption(f"`blocks` has an empty item or too many: {blocks!r:.80}")
        pairs = [item.rpartition("=") for item in items]
        if all(equals for _, equals, _ in pairs):
            return cls(named=tuple((name.strip(), _read_factor(x)) for name, _, x in pairs))
        if any(equals for _, equals, _ in pairs):
            raise InvalidOption(
                f"`blocks` mixes numbers and names: {blocks!r:.80}; give either a number for each "
                'block ("1,0.5,0") or a number for each name ("IN04=0.5, OUT*=0")'
            )
        return cls(tuple(map(_read_factor, items)))

    def __str__(self) -> str:
        """Returns the notation."""
        if self.numbers:
            return ",".join(f"{x:g}" for x in self.numbers)
        return ", ".join(f"{name}={x:g}" for name, x in self.named)

    def resolve(self, table: DepthTable, modules: Iterable[str], title: str) -> dict[str, float]:
        """Returns the factor of every module, without factors of 1.

        `table` has the blocks of the model that the LoRA is for, which messages call `title`.

        Raises:
            InvalidOption: another number of factors than the model has blocks, or a name that is
                none of its blocks and modules.
        """
        modules = list(modules)
        if not self.numbers:
            factors = self._resolve_names(table, modules, title)
        else:
            factors = self._resolve_numbers(table, modules, title)
        return {module: factor for module, factor in factors.items() if factor != 1}

    def _resolve_numbers(
        self, table: DepthTable, modules: Collection[str], title: str
    ) -> dict[str, float]:
        """Maps numbers to blocks; a block outside the notation gets 0."""
        fitting = [places for places in table.notations if len(places) == len(self.numbers)]
        if not fitting:
            notations = " or ".join(
                f"{len(places)} ({_write_places(places)})" for places in table.notations if places
            )
            raise InvalidOption(
                f"`blocks` has {len(self.numbers)} numbers, and {title} takes "
                f"{notations or 'names alone'}; names take a number each: "
                '"transformer_blocks.0-9=0.5"'
            )
        factors = dict(zip(fitting[0], self.numbers, strict=True))
        placed = {module: place for module in modules if (place := table.find_place(module))}
        if BASE not in factors:
            placed = {module: place for module, place in placed.items() if place != BASE}
        return {module: factors.get(place, 0.0) for module, place in placed.items()}

    def _resolve_names(
        self, table: DepthTable, modules: Collection[str], title: str
    ) -> dict[str, float]:
        factors: dict[str, float] = {}
        for name, factor in self.named:
            fits = _Pattern(name, table)
            factors |= {module: factor for module in modules if fits(module)}
            if not any(map(fits, (*modules, *table.modules))) and name not in table.places:
                raise InvalidOption(
                    f"`blocks` names {name!r:.60}, which is not a block or module of {title}; its "
                    f"blocks are {_write_places(table.places) or 'none'}"
                )
        return factors


def _write_places(places: Sequence[str]) -> str:
    """Writes all blocks, consecutive ones as ranges: IN00-IN08, layers.0-9."""
    runs: list[list[str]] = []
    for place in places:
        stem = place.rstrip("0123456789")
        last = runs[-1][-1] if runs else ""
        numbers = last.removeprefix(stem), place[len(stem) :]
        follows = last.startswith(stem) and all(map(str.isdecimal, numbers))
        if follows and int(numbers[1]) == int(numbers[0]) + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    ends = ((run[0], run[-1].rpartition(".")[2]) for run in runs)
    return ", ".join(first if first.endswith(last) else f"{first}-{last}" for first, last in ends)


class _Pattern:
    """What a name of `blocks` stands for."""

    def __init__(self, name: str, table: DepthTable) -> None:
        self._name, self._table = name, table
        places = {place.casefold(): i for i, place in enumerate(table.places)}
        first, _, last = name.partition("-")
        ends = [places.get(_spell_place(end).casefold()) for end in (first, last or first)]
        self._places: set[str] | None = None
        if _PLACE.fullmatch(first) and None not in ends:
            low, high = sorted(i for i in ends if i is not None)
            self._places = set(table.places[low : high + 1])
        self._range = _RANGE.fullmatch(name)

    def __call__(self, module: str) -> bool:
        place = self._table.find_place(module)
        if self._places is not None:
            return place in self._places
        names = [*self._table.list_names(module), *([place] if place else [])]
        if self._range is not None:
            stack, low, high = self._range[1], int(self._range[2]), int(self._range[3])
            rests = [n.removeprefix(f"{stack}.") for n in names if n.startswith(f"{stack}.")]
            numbers = [rest.partition(".")[0] for rest in rests]
            return any(n.isdecimal() and low <= int(n) <= high for n in numbers)
        return any(fnmatchcase(n, self._name) or n.startswith(f"{self._name}.") for n in names)


def _spell_place(place: str) -> str:
    """Spells a block with two digits: MID is M00, in4 is IN04."""
    word = place.upper().rstrip("0123456789")
    number = place[len(word) :]
    if word in ("M", "MID"):
        return MIDDLE
    return f"{word}{int(number):02}" if number and word != "T" else place.upper()


def _read_factor(value: object) -> float:
    """Reads one factor; refuses what is no number, or too large."""
    try:
        factor = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        factor = math.nan
    if not abs(factor) <= LARGEST_FACTOR or isinstance(value, bool):
        raise InvalidOption(
            f"`blocks` has {value!r:.40}, which is not a number of {LARGEST_FACTOR:.0e} at most"
        )
    return factor


def list_lora_blocks(adapter: Adapter) -> DepthTable:
    """Lists the blocks of a LoRA's model, as far as it tells.

    The blocks of the published size that it fits, or of its family's only one; else its own.
    """
    model = adapter.model
    family = known_families()[model.families[0]] if model.families else None
    single = family is not None and len(family.layouts) == 1
    layouts = model.sizes or (family.layouts if family and single else ())
    if layouts:
        return DepthTable(tuple(load_layout(layouts[0]).shapes), family)
    return DepthTable(tuple(adapter.updates), family, complete=False)


def find_factors(blocks: Blocks | None, adapter: Adapter, base: Base | None) -> dict[str, float]:
    """Returns module of an adapter -> the factor of its block.

    By the blocks of its base if that is given.

    Raises:
        InvalidOption: see `BlockWeights.resolve`.
    """
    if blocks is None:
        return {}
    if base is None:
        table = list_lora_blocks(adapter)
    else:
        table = DepthTable(tuple(base.shapes), known_families().get(base.family or ""))
    title = table.family.title if table.family else base.name if base else "this model"
    names = {*adapter.updates, *(name.rpartition(".")[0] for name in adapter.vectors)}
    return BlockWeights.read(blocks).resolve(table, names, title)


def scale_adapter(adapter: Adapter, factors: Mapping[str, float]) -> Adapter:
    """Multiplies updates and vectors by their modules' factors; 0 removes them.

    Raises:
        InvalidOption: nothing would be left.
    """
    updates = {
        name: update if name not in factors else LowRank(update.up * factors[name], update.down)
        for name, update in adapter.updates.items()
        if factors.get(name) != 0
    }
    if adapter.updates and not updates:
        raise InvalidOption("`blocks` leaves no module of the LoRA, every factor is 0")
    vectors = {
        name: vector if factor == 1 else vector * factor
        for name, vector in adapter.vectors.items()
        if (factor := factors.get(name.rpartition(".")[0], 1.0)) != 0
    }
    return replace(adapter, updates=updates, vectors=vectors)
