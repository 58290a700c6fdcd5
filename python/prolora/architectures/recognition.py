"""Families that fit a set of modules: by names, then sizes, then proportions.

Names alone rarely decide: `transformer_blocks.0.attn.to_q` is in a dozen families. Sizes mostly do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

from .families import known_families
from .family import AuthorsWeight, Family, list_trials
from .layouts import load_layout
from .modules import find_block, matrix_shape


class NamedMatrix(NamedTuple):
    """A module as a file names it."""

    name: str  # without any prefix
    dotted: bool = True  # False where underscores replace the dots
    shape: tuple[int, int] = (0, 0)  # out × in of its matrix; 0 where it is not known


@dataclass(frozen=True)
class Recognition:
    """The families that some modules can belong to."""

    # the best fits, sorted by id; empty where no family knows all modules
    families: tuple[Family, ...] = ()
    layouts: tuple[str, ...] = ()  # ids of the published sizes in which every module has its shape
    # all families that know every module by its name, whatever their sizes
    able: tuple[Family, ...] = ()

    @property
    def family(self) -> Family | None:
        """The family, None if several fit or none has a published size with these modules."""
        return self.families[0] if len(self.families) == 1 and self.layouts else None


def recognise_families(modules: Iterable[NamedMatrix], unets: bool = False) -> Recognition:
    """Returns the families with all these modules that fit their sizes best.

    A module that no family knows is ignored, unless such modules are the majority. A family with a
    published size in which every module has its very shape comes first, then one with a size in
    which every module has its name, then any that has the names for blocks of other numbers; among
    equals, the family with more weights in the published proportions. The modules belong to a
    transformer or, with `unets`, to a UNet, and to no text encoder.
    """
    return _recognise(tuple(dict.fromkeys(modules)), unets)


@lru_cache(maxsize=16)  # the LoRAs of a folder mostly have the same modules
def _recognise(given: tuple[NamedMatrix, ...], unets: bool) -> Recognition:
    families = {id_: one for id_, one in known_families().items() if one.unet == unets}
    known: dict[str, dict[NamedMatrix, dict[str, tuple[int, int]]]] = {id_: {} for id_ in families}
    for module in given:
        for id_ in _list_candidates(module):
            if id_ in families and (parts := find_parts(families[id_], module)):
                known[id_][module] = parts
    by_any = {module for parts in known.values() for module in parts}
    if not by_any or 2 * len(by_any) < len(given):
        return Recognition()
    shapes = {
        id_: {name: shape for piece in parts.values() for name, shape in piece.items()}
        for id_, parts in sorted(known.items())
        if len(parts) == len(by_any)
    }
    able = tuple(families[id_] for id_ in shapes)
    exact: dict[str, list[str]] = {}
    for within_blocks in (False, True):  # where no family fits, a module beside them may be changed
        exact = exact or {
            id_: fitting
            for id_, modules_of in shapes.items()
            if (fitting := _fit_layouts(families[id_], modules_of, within_blocks))
        }
    if exact:
        exact = _prefer_filled(exact, shapes)
        exact = {id_: of for id_, of in exact.items() if families[id_].rarer_than not in exact}
        layouts = tuple(layout for id_ in exact for layout in exact[id_])
        return Recognition(tuple(families[id_] for id_ in exact), layouts, able)
    within = [id_ for id_ in shapes if _has_names(families[id_], shapes[id_])]
    likely = [id_ for id_ in within or shapes if families[id_].rarer_than not in shapes]
    scores = {id_: _count_proportions(families[id_], shapes[id_]) for id_ in likely}
    best = [id_ for id_ in scores if scores[id_] == max(scores.values())]
    return Recognition(tuple(families[id_] for id_ in best), (), able)


def _list_candidates(module: NamedMatrix) -> set[str]:
    """Returns the families with a pattern for a name.

    They are few, so thousands of names take no time.
    """
    holders = _find_holders(module.dotted)
    patterns = list_trials(module.name, "." if module.dotted else "_")
    return {id_ for pattern, _ in patterns for id_ in holders.get(pattern, ())}


@cache
def _find_holders(dotted: bool) -> dict[str, list[str]]:
    """Returns pattern of a module or weight -> the families that have it."""
    holders: dict[str, list[str]] = {}
    for id_, family in known_families().items():
        for pattern in family.list_patterns(dotted=dotted):
            holders.setdefault(pattern, []).append(id_)
    return holders


def find_parts(family: Family, module: NamedMatrix) -> dict[str, tuple[int, int]]:
    """Returns the canonical modules in a matrix of a file -> their shapes; {} if unknown."""
    name, dotted, (out, inputs) = module
    canonical = family.find_module(name, dotted=dotted)
    if canonical is not None:
        return {canonical: (out, inputs)}
    weight = family.find_weight(name, dotted=dotted)
    return share_rows(weight, (out, inputs)) if weight else {}


def share_rows(weight: AuthorsWeight, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Returns the shapes of a matrix's parts; 0 rows where they do not divide evenly."""
    unit, rest = divmod(shape[0], sum(weight.shares))
    return {
        part: (0 if rest else unit * share, shape[1])
        for part, share in zip(weight.parts, weight.shares, strict=True)
    }


def _fit_layouts(family: Family, shapes: Mapping[str, tuple[int, int]], within: bool) -> list[str]:
    """Returns the family's sizes with these shapes, everywhere or within blocks."""
    some = {name: shape for name, shape in shapes.items() if find_block(name) or not within}
    layouts = {id_: load_layout(id_).shapes for id_ in family.layouts if some}
    return [
        id_
        for id_, layout in layouts.items()
        if all(n in layout and _are_equal(s, matrix_shape(layout[n])) for n, s in some.items())
    ]


def _prefer_filled(
    exact: dict[str, list[str]], shapes: Mapping[str, Mapping[str, tuple[int, int]]]
) -> dict[str, list[str]]:
    """Returns the sizes whose blocks are all present, by family; if none, all.

    FLUX.1 has 19 and 38 blocks, HunyuanVideo 20 and 40 of the same names and shapes: a LoRA on
    blocks 0 to 18 and 0 to 37 is one for FLUX.1.
    """
    filled: dict[str, list[str]] = {}
    for id_, layouts in exact.items():
        blocks = _list_blocks(shapes[id_])
        for layout in layouts if blocks else ():
            if all(numbers == _count_blocks(layout).get(at) for at, numbers in blocks.items()):
                filled.setdefault(id_, []).append(layout)
    return filled or exact


@cache
def _count_blocks(layout: str) -> dict[str, set[str]]:
    return _list_blocks(load_layout(layout).shapes)


def _list_blocks(modules: Iterable[str]) -> dict[str, set[str]]:
    """Returns stack -> the numbers of its blocks that some modules lie in."""
    stacks: dict[str, set[str]] = {}
    for name in modules:
        block = find_block(name)
        if block is not None:
            stacks.setdefault(block.stack, set()).add(block.number)
    return stacks


def _has_names(family: Family, names: Iterable[str]) -> bool:
    """Returns whether a published size has all these modules, of any shape."""
    names = list(names)
    return any(
        all(name in layout for name in names)
        for layout in (load_layout(id_).shapes for id_ in family.layouts)
    )


def _are_equal(shape: tuple[int, int], published: tuple[int, int]) -> bool:
    """Compares the known sizes; rows that do not divide evenly match none."""
    if shape[0] == 0 and shape[1] != 0:
        return False
    return all(size in (0, other) for size, other in zip(shape, published, strict=True))


def _count_proportions(family: Family, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Counts the modules whose rows and columns are in a published proportion."""
    count = 0
    for name, (out, inputs) in shapes.items():
        published = [matrix_shape(shape) for shape in family.find_shapes(name)]
        count += any(out * n == inputs * m for m, n in published) if out and inputs else 0
    return count
