"""Tables of what became of modules.

Means are weighted by the energy of the updates, and None where a number is not known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ..architectures.depth import is_number, stack_order
from ..architectures.modules import find_block, find_stage, write_shape
from ..core.grouping import group_by
from .module_report import Measures, ModuleReport
from .table import NOTHING, Cell, Column, Row, Table, make_table, write_extremes

MODULES = "modules"
"""The id of the table that can be sorted and filtered."""

_PARTS = ("to_q", "to_k", "to_v", "to_out", "add_q", "add_k", "add_v", "to_add_out")
"""The parts of an attention layer in the order of the computation."""

Measured = tuple[Column, Callable[[Sequence[ModuleReport]], float | None]]

MEASURED: tuple[Measured, ...] = (
    (Column("kept", ".0%", has_bar=True), lambda rows: average_rows(rows, share_kept)),
    (Column("vs copy", ".2f"), lambda rows: average_rows(rows, lambda row: row.copy_distance)),
    (Column("norm", ".2f"), lambda rows: average_rows(rows, lambda row: row.norm_ratio)),
    (Column("drift", ".2f"), lambda rows: average_rows(rows, lambda row: row.drift)),
    (Column("Φ l", ".2f"), lambda rows: average_measures(rows, lambda m: m.phi_left)),
    (Column("Φ r", ".2f"), lambda rows: average_measures(rows, lambda m: m.phi_right)),
    (Column("above", ".2f"), lambda rows: find_overlap(rows)),
    (Column("mixed", ".0%"), lambda rows: average_measures(rows, lambda m: m.mixed_energy)),
)
"""The numbers of modules that moved; those of a fit have no "kept"."""


def tabulate_moved(title: str, rows: Sequence[ModuleReport], measured: Sequence[Measured]) -> Table:
    """Tabulates what moved, by part of the model.

    `measured` is empty where nothing has moved yet, so that ranks alone are known.
    """
    parts = group_by(rows, lambda row: find_stage(row.source))
    shown = []
    for name, some in (*parts.items(), ("all", rows)):
        cells: list[Cell] = [name.replace("transformer_blocks", "blocks"), len(some)]
        cells += [value(some) for _, value in measured]
        known_ranks = [row.rank_out for row in some if row.rank_out or measured]
        ranks = write_extremes(known_ranks) if known_ranks else NOTHING
        shown.append(Row((*cells, ranks), "total" if name == "all" else ""))
    names = Column("part"), Column("n", "d"), *(column for column, _ in measured)
    return make_table(title, (*names, Column("rank", "")), shown)


def tabulate_modules(modules: Sequence[ModuleReport], measured: Sequence[Measured]) -> Table:
    """Tabulates every module of the LoRA in model order, moved or not."""
    total = sum(row.energy for row in modules)
    renamed = any(row.target not in (None, row.source) for row in modules)
    columns = [Column("module"), *([Column("target")] if renamed else []), Column("status")]
    columns += [column for column, _ in measured]
    columns += [Column("angle", ".0f"), Column("energy", ".2%")]
    columns += [Column(name, "") for name in ("rank in", "rank out", "shape")] + [Column("why")]
    rows = []
    for row in sorted(modules, key=lambda row: _order_module(row.source)):
        moved = [row] if row.status == "mapped" else []
        angle = average_measures(moved, lambda m: m.angle)
        cells: list[Cell] = [row.source, *([row.target or NOTHING] if renamed else []), row.status]
        cells += [value(moved) for _, value in measured]
        degrees = None if angle is None else math.degrees(angle)
        cells += [degrees, row.energy / total if total else None, str(row.rank_in or NOTHING)]
        shape = write_shape(row.shape) or NOTHING
        cells += [str(row.rank_out) if moved else NOTHING, shape, row.reason]
        rows.append(Row(tuple(cells), "" if moved else "warn"))
    return make_table("Every module of the LoRA", columns, rows, MODULES)


def share_kept(row: ModuleReport) -> float | None:
    """Returns the share of a module's energy that is on the target.

    Strength and cut rank included. Above 1 where an update became larger; None where a fitted
    update has nothing to be compared with.
    """
    if row.status != "mapped":
        return 0.0
    return None if math.isnan(row.norm_ratio) else row.norm_ratio**2


def _order_module(name: str) -> tuple[object, ...]:
    """Orders modules as the model computes: by stack, block, layer and part of it."""
    block = find_block(name)
    if block is None:  # around a stack of blocks, and before them
        place, _, kind = name.rpartition(".")
        return stack_order(place), False, 0, _order_kind(kind)
    place = block.stack.removesuffix(".transformer_blocks")
    number = int(block.number) if is_number(block.number) else 0
    return stack_order(place), True, number, _order_kind(block.local)


def _order_kind(kind: str) -> tuple[object, ...]:
    layer, _, part = kind.partition(".")
    place = next((i for i, start in enumerate(_PARTS) if part.startswith(start)), len(_PARTS))
    return not part, layer, place, kind


def tabulate_reasons(modules: Iterable[ModuleReport]) -> Table | None:
    """Tabulates why modules were left behind; None if all moved."""
    counts = Counter((row.status, row.reason) for row in modules if row.status != "mapped")
    columns = Column("why"), Column("status"), Column("n", "d")
    rows = [Row((why, status, count)) for (status, why), count in counts.most_common()]
    return make_table("Modules that did not move", columns, rows) if rows else None


def weighted_mean(pairs: Iterable[tuple[float, float | None]]) -> float | None:
    """Averages (weight, value) pairs without None values; None if no weight is left."""
    finite = [(weight, value) for weight, value in pairs if value is not None]
    total = sum(weight for weight, _ in finite)
    return float(sum(weight * value for weight, value in finite) / total) if total else None


def average_rows(
    rows: Sequence[ModuleReport], value: Callable[[ModuleReport], float | None]
) -> float | None:
    """Averages over modules; None for a text encoder carried over uncompared."""
    is_compared = any(row.drift is not None or row.measures is not None for row in rows)
    return weighted_mean((row.energy, value(row)) for row in rows) if is_compared else None


def average_measures(
    rows: Sequence[ModuleReport], value: Callable[[Measures], float]
) -> float | None:
    """Averages over modules that were projected."""
    return weighted_mean((row.energy, value(row.measures)) for row in rows if row.measures)


def find_overlap(rows: Sequence[ModuleReport]) -> float | None:
    """Returns the overlap above chance of the worse side."""
    left = average_measures(rows, lambda m: m.above_left)
    right = average_measures(rows, lambda m: m.above_right)
    return min((side for side in (left, right) if side is not None), default=None)
