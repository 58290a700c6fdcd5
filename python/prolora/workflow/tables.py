"""What each table holds: of a report, a comparison, an advice and a description of a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ..comparison.module_map import BlockDecision
from ..core.grouping import group_by
from ..probe.crossed import BandReport
from .group_means import average_measures, average_rows, find_overlap, group_rows
from .module_report import ModuleReport
from .place_map import PlaceMap, Spot
from .table import NOTHING, Cell, Column, Row, Table, make_table, write_extremes

_COLUMNS: tuple[tuple[Column, Callable[[Sequence[ModuleReport]], float | None]], ...] = (
    (Column("kept", ".0%", has_bar=True), lambda rows: average_rows(rows, share_written)),
    (Column("vs copy", ".2f"), lambda rows: average_rows(rows, lambda row: row.copy_distance)),
    (Column("norm", ".2f"), lambda rows: average_rows(rows, lambda row: row.norm_ratio)),
    (Column("drift", ".2f"), lambda rows: average_rows(rows, lambda row: row.drift)),
    (Column("Φ l", ".2f"), lambda rows: average_measures(rows, lambda m: m.phi_left)),
    (Column("Φ r", ".2f"), lambda rows: average_measures(rows, lambda m: m.phi_right)),
    (Column("above", ".2f"), find_overlap),
    (Column("mixed", ".0%"), lambda rows: average_measures(rows, lambda m: m.mixed_energy)),
)
"""The numbers of modules that moved."""

_ANGLE = Column("angle", "")


def tabulate_moved(
    title: str, rows: Sequence[ModuleReport], every_module: bool, is_planned: bool
) -> Table:
    """Tabulates what moved, by part of the model or module.

    Args:
        title: of the table.
        rows: the modules that moved, at least one.
        every_module: a row for each of them.
        is_planned: nothing has moved yet, so that ranks alone are known.
    """
    known = () if is_planned else _COLUMNS
    groups = group_rows(rows, every_module)
    # One row to a module needs no number of them, and 80 columns hold either.
    first = _ANGLE if every_module else Column("n", "d")
    shown = []
    for name, some in (*groups.items(), ("all", rows)):
        part = name if every_module else name.replace("transformer_blocks", "blocks")
        cells: list[Cell] = [part, _write_angle(some) if every_module else len(some)]
        cells += [value(some) for _, value in known]
        known_ranks = [row.rank_out for row in some if row.rank_out or not is_planned]
        ranks = write_extremes(known_ranks) if known_ranks else NOTHING
        shown.append(Row((*cells, ranks), "total" if name == "all" else ""))
    names = Column("module" if every_module else "part"), first, *(column for column, _ in known)
    return make_table(title, (*names, Column("rank", "")), shown)


def _write_angle(rows: Sequence[ModuleReport]) -> str:
    """Writes the median and the largest principal angle in degrees."""
    angle = average_measures(rows, lambda m: m.angle)
    largest = average_measures(rows, lambda m: m.largest_angle)
    if angle is None or largest is None:
        return NOTHING
    return f"{math.degrees(angle):.0f}…{math.degrees(largest):.0f}°"


def tabulate_modules(modules: Sequence[ModuleReport], is_planned: bool) -> Table:
    """Tabulates every module of the LoRA in model order, moved or not."""
    total = sum(row.energy for row in modules)
    renamed = any(row.target not in (None, row.source) for row in modules)
    known = () if is_planned else _COLUMNS
    columns = [Column("module"), *([Column("target")] if renamed else []), Column("status")]
    columns += [column for column, _ in known] + [Column("angle", ".0f"), Column("energy", ".2%")]
    columns += [Column(name, "") for name in ("rank in", "rank out", "shape")] + [Column("why")]
    rows = []
    for i in map_modules(modules, is_planned).order:
        row = modules[i]
        moved = [row] if row.status == "mapped" else []
        angle = average_measures(moved, lambda m: m.angle)
        cells: list[Cell] = [row.source, *([row.target or NOTHING] if renamed else []), row.status]
        cells += [value(moved) for _, value in known]
        degrees = None if angle is None else math.degrees(angle)
        cells += [degrees, row.energy / total if total else None, str(row.rank_in or NOTHING)]
        cells += [str(row.rank_out) if moved else NOTHING, write_shape(row.shape), row.reason]
        rows.append(Row(tuple(cells), "" if moved else "warn", f"m{i}"))
    return make_table("Every module of the LoRA", columns, rows)


def write_shape(shape: Sequence[int]) -> str:
    """Writes a shape as `320×768`, or a dash."""
    return "×".join(map(str, shape)) or NOTHING


def map_modules(modules: Sequence[ModuleReport], is_planned: bool) -> PlaceMap:
    """Maps where in the model a LoRA was kept."""
    spots = []
    for row in modules:
        share = None if is_planned else share_kept(row)
        text = describe_module(row, share)
        spots.append(Spot(row.source, share, row.status == "mapped", row.energy, text))
    if is_planned:
        return PlaceMap(spots, "", "would move", "would not move")
    return PlaceMap(spots)


def share_kept(row: ModuleReport) -> float | None:
    """Returns the share of a module's energy that is on the target.

    Strength and cut rank included. Above 1 where an update became larger; None where a fitted
    update has nothing to be compared with.
    """
    if row.status != "mapped":
        return 0.0
    share = share_written(row)
    return None if math.isnan(share) else share


def share_written(row: ModuleReport) -> float:
    """Returns ‖ΔW_t‖²/‖ΔW_s‖² of what was written, or NaN."""
    return row.surviving_energy * (1 - row.rank_cut_energy)


def describe_module(row: ModuleReport, share: float | None) -> str:
    """Describes a module in a line: name, what became of it, why."""
    if row.status != "mapped":
        return f"{row.source}: {row.status}, {row.reason}"
    kept = "" if share is None else f" {share:.0%} kept,"
    onto = f" to {row.target}," if row.target not in (None, row.source) else ""
    return f"{row.source}:{onto}{kept} {row.reason}"


def tabulate_reasons(modules: Iterable[ModuleReport]) -> Table | None:
    """Tabulates why modules were left behind; None if all moved."""
    counts = Counter((row.status, row.reason) for row in modules if row.status != "mapped")
    columns = Column("why"), Column("status"), Column("n", "d")
    rows = [Row((why, status, count)) for (status, why), count in counts.most_common()]
    return make_table("Modules that did not move", columns, rows) if rows else None


def tabulate_bands(bands: Iterable[BandReport]) -> Table:
    """Tabulates what crossed between two latent spaces, by band."""
    columns = Column("band"), Column("of the wanted change", ".0%"), Column("reached", ".0%")
    rows = [Row((band.name, band.energy, band.reached)) for band in bands]
    return make_table("What crossed, on held-out probes", columns, rows)


def tabulate_decisions(
    decisions: Sequence[BlockDecision], unused: Sequence[str], every_block: bool
) -> Table:
    """Tabulates where blocks came from, by stack or by block."""
    title = f"Blocks matched by similarity; {len(unused)} of the source's are not used"
    score, margin = Column("score", ".2f"), Column("margin", ".2f")
    if every_block:
        columns = Column("block"), Column("from"), Column("runner-up"), score, Column("2nd", ".2f")
        rows = [
            Row(
                (
                    *(
                        (name or "none").replace(".transformer_blocks.", ".")
                        for name in (decision.target, decision.source, decision.runner_up)
                    ),
                    *(decision.score, decision.runner_up_score, decision.margin),
                ),
                "" if decision.source else "warn",
            )
            for decision in decisions
        ]
        return make_table(title, (*columns, margin), rows)
    stacks = group_by(decisions, lambda decision: decision.target.rpartition(".")[0])
    rows = [
        Row(
            (
                name.removesuffix(".transformer_blocks"),
                _write_origins(name, several),
                min(decision.score for decision in several),
                min(decision.margin for decision in several),
            )
        )
        for name, several in stacks.items()
    ]
    least = Column("least score", ".2f"), Column("least margin", ".2f")
    return make_table(title, (Column("blocks"), Column("block←from"), *least), rows)


def _write_origins(stack: str, decisions: list[BlockDecision]) -> str:
    """Writes `0←0 1←3`, with the source's stack if it differs."""
    origins = []
    for decision in decisions:
        origin, _, index = (decision.source or "").rpartition(".")
        prefix = "" if origin in ("", stack) else origin.removesuffix(".transformer_blocks") + "."
        origins.append(f"{decision.target.rpartition('.')[2]}←{prefix}{index or 'none'}")
    return " ".join(origins)
