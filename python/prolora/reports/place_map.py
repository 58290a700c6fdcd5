"""Where in the model something lies: a column for each block in order, a row for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..architectures.depth import is_number, stack_order
from ..architectures.modules import find_block, find_stage
from ..core.grouping import group_by

AROUND = "proj"
"""The depth of what stands around a stack of blocks: proj_in and proj_out."""

# The parts of an attention layer in the order of the computation.
_PARTS = ("to_q", "to_k", "to_v", "to_out", "add_q", "add_k", "add_v", "to_add_out")

OUTSIDE = "outside"
"""The stage of modules that belong to no part, such as a transformer's `x_embedder`."""


@dataclass(frozen=True)
class Spot:
    """A module of a map."""

    name: str  # of the module
    share: float | None  # the number that its colour shows, 0 … 1; None where it is not known
    is_there: bool = True  # False where there is nothing to show, for a module that did not move
    weight: float = 1.0  # how much its number counts beside others in its cell
    text: str = ""  # shown under the pointer


@dataclass(frozen=True, order=True)
class MapColumn:
    """A block, or what stands around a stack of blocks."""

    order: tuple[object, ...] = field(repr=False)
    place: str
    depth: str
    stage: str = field(compare=False)


@dataclass(frozen=True)
class PlaceMap:
    """Modules by place.

    Attributes:
        spots: the modules in any order.
        title: what the colours show.
        there, missing: what is said of a module whose number is not known, and of one that is not
            there.
    """

    spots: Sequence[Spot]
    title: str = "Share of a module's energy on the target"
    there: str = "moved, share not known"
    missing: str = "not moved"

    @cached_property
    def cells(self) -> dict[tuple[MapColumn, str], list[int]]:
        """(column, kind) -> the indices of its modules, mostly one; in the order of the model."""
        groups = group_by(range(len(self.spots)), lambda i: _find_place(self.spots[i].name))
        return dict(sorted(groups.items(), key=lambda item: (item[0][0], column_order(item[0][1]))))

    @property
    def order(self) -> list[int]:
        """The modules by their index, in the order of the model."""
        return [index for cell in self.cells.values() for index in cell]

    @property
    def columns(self) -> list[MapColumn]:
        """In the order of a forward pass; what stands around a stack comes before it."""
        return list(dict.fromkeys(column for column, _ in self.cells))

    @property
    def kinds(self) -> list[str]:
        """The kinds of module: inside blocks by layer, then around them."""
        return sorted({kind for _, kind in self.cells}, key=column_order)


def _find_place(module: str) -> tuple[MapColumn, str]:
    """Returns the column and the kind of a module.

    In a UNet the stack is the attention around a stack of blocks.
    """
    block = find_block(module)
    if block is not None:
        place, depth = block.stack.removesuffix(".transformer_blocks"), block.number
        kind = block.local
    else:
        (place, _, kind), depth = module.rpartition("."), AROUND
    stage = find_stage(module) if place else OUTSIDE
    # Beside the stack it surrounds, and before it.
    order = stack_order(place), depth != AROUND, column_order(depth)
    return MapColumn(order, place, depth, stage), kind


def column_order(name: str) -> tuple[object, ...]:
    """Sorts depths by number, and kinds by layer and part; `AROUND` and its kinds come last."""
    layer, _, part = name.partition(".")
    place = next((i for i, start in enumerate(_PARTS) if part.startswith(start)), len(_PARTS))
    number = int(name) if is_number(name) else None
    return number is None, not part, number or 0, layer, place, name
