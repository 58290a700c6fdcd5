"""Where in the model a LoRA was kept: a column for each block in order, a row for each kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ...architectures.modules import find_stage
from ...comparison.transformer_blocks import AROUND, column_order, split_module, stack_order
from ...core.means import weighted_mean
from ..module_report import ModuleReport

OUTSIDE = "outside"
"""The stage of modules that belong to no part, such as a transformer's `x_embedder`."""


@dataclass(frozen=True, order=True)
class MapColumn:
    """A block, or what stands around a stack of blocks."""

    order: tuple[object, ...] = field(repr=False)
    place: str
    depth: str
    stage: str = field(compare=False)


@dataclass(frozen=True)
class Cell:
    """The modules of one kind in one block; mostly one.

    Attributes:
        rows: what became of each.
        indices: where they stand in the report.
        share: the share of their energy that is on the target, None where it is not known.
    """

    rows: tuple[ModuleReport, ...]
    indices: tuple[int, ...]
    share: float | None

    @property
    def moved(self) -> bool:
        """Whether anything of it has a place on the target."""
        return any(row.status == "mapped" for row in self.rows)


@dataclass(frozen=True)
class PlaceMap:
    """A report's modules by place.

    Attributes:
        modules: in the order of the report.
        is_planned: whether nothing was moved yet, so that no share is known.
    """

    modules: tuple[ModuleReport, ...]
    is_planned: bool = False

    @cached_property
    def cells(self) -> dict[tuple[MapColumn, str], Cell]:
        """(column, kind) -> its modules."""
        groups: dict[tuple[MapColumn, str], list[int]] = {}
        for i, row in enumerate(self.modules):
            groups.setdefault(_locate(row.source), []).append(i)
        cells = {}
        for key, indices in groups.items():
            rows = tuple(self.modules[i] for i in indices)
            share = None if self.is_planned else share_kept(rows)
            cells[key] = Cell(rows, tuple(indices), share)
        return cells

    @cached_property
    def order(self) -> list[int]:
        """The modules by their index in the report, in the order of the model."""
        kinds = {kind: i for i, kind in enumerate(self.kinds)}
        ordered = sorted(self.cells.items(), key=lambda item: (item[0][0], kinds[item[0][1]]))
        return [index for _, cell in ordered for index in cell.indices]

    @cached_property
    def columns(self) -> list[MapColumn]:
        """In the order of a forward pass; what stands around a stack comes before it."""
        return sorted({column for column, _ in self.cells})

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds of module: inside blocks by layer, then around them."""
        return sorted({kind for _, kind in self.cells}, key=column_order)


def _locate(module: str) -> tuple[MapColumn, str]:
    """The column and the kind of a module."""
    place, depth, kind = split_module(module)
    stage = find_stage(module) if place else OUTSIDE
    # Beside the stack it surrounds, and before it.
    order = stack_order(place), depth != AROUND, column_order(depth)
    return MapColumn(order, place, depth, stage), kind


def share_kept(
    rows: Sequence[ModuleReport],
) -> float | None:
    """The share of the modules' energy that is on the target, strength and cut rank included.

    Args:
        rows: some modules of a report.

    Returns:
        Above 1 where an update became larger; None where a fitted update has nothing to be
        compared with. Modules without energy count alike.
    """
    shares = [_share(row) for row in rows]
    if any(math.isnan(share) for share in shares):
        return None
    mean = weighted_mean((row.energy, share) for row, share in zip(rows, shares, strict=True))
    return sum(shares) / len(shares) if mean is None else mean


def _share(row: ModuleReport) -> float:
    if row.status != "mapped":
        return 0.0
    return row.surviving_energy * (1 - row.rank_cut_energy)
