"""The tables of a page: parts of the model, modules that did not move, and every module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..group_means import GroupMeans, group_rows
from ..module_report import Measures, ModuleReport
from .drawing import draw_bar
from .markup import Html, break_name, join, tag
from .place_map import PlaceMap

if TYPE_CHECKING:
    from ..report import Report

NOTHING = "–"


def write_number(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash where there is none."""
    return NOTHING if value is None or value != value else format(value, form)


def write_table(
    heads: Sequence[str | Html], rows: Iterable[Html], caption: str, **attributes: str
) -> Html:
    """A table that may be scrolled if it is wider than the page.

    Args:
        heads: of the columns, texts or what `number_head` gives.
        rows: as `tag("tr", …)` makes them.
        caption: what it shows, for those who do not see the heading above it.
        **attributes: of the table; `id` also names the frame that scrolls, with "-frame" behind it.
    """
    cells = [head if isinstance(head, Html) else tag("th", head, scope="col") for head in heads]
    head, body = tag("thead", tag("tr", *cells)), tag("tbody", *rows)
    table = tag("table", tag("caption", caption), head, body, **attributes)
    frame = f"{attributes['id']}-frame" if "id" in attributes else None
    return tag(
        "div", table, class_="scroll", id=frame, tabindex=0, role="region", aria_label=caption
    )


def number_head(name: str) -> Html:
    """The head of a column of numbers."""
    return tag("th", name, scope="col", class_="n")


def name_cell(name: str) -> Html:
    """The first cell of a row."""
    return tag("th", break_name(name), scope="row")


def number_cell(text: object) -> Html:
    """A cell whose numbers stand in a column."""
    return tag("td", text, class_="n")


def stage_table(report: Report) -> Html:
    """What was mapped: a row for each part of the model, as the terminal shows it."""
    order = PlaceMap(report.modules).order
    mapped = [row for row in (report.modules[i] for i in order) if row.status == "mapped"]
    groups = group_rows(mapped)
    means = {name: GroupMeans.of(rows) for name, rows in (*groups.items(), ("all", mapped))}
    columns = [column for column in _STAGE_COLUMNS if column.is_known(means.values())]
    names = ["modules", *(column.name for column in columns), "rank"]
    heads = ["part", *map(number_head, names)]
    rows = []
    for name, numbers in means.items():
        low, high = numbers.ranks
        rank = str(low) if low == high else f"{low}…{high}"
        cells = (number_cell(column.show(numbers)) for column in columns)
        first = name_cell(name), number_cell(numbers.modules)
        rows.append(tag("tr", *first, *cells, number_cell(rank)))
    return write_table(heads, rows, "What moved, by part of the model", class_="stages")


@dataclass(frozen=True)
class _Column:
    """A number of the table of parts."""

    name: str
    value: Callable[[GroupMeans], float | None]
    form: str = ".2f"
    has_bar: bool = False

    def is_known(self, means: Iterable[GroupMeans]) -> bool:
        return any(write_number(self.value(numbers)) != NOTHING for numbers in means)

    def show(self, numbers: GroupMeans) -> Html:
        value = self.value(numbers)
        text = write_number(value, self.form)
        return join([draw_bar(value), text] if self.has_bar else [text])


_STAGE_COLUMNS = (
    _Column("kept", lambda m: m.kept, ".0%", has_bar=True),
    _Column("vs copy", lambda m: m.copy_distance),
    _Column("norm", lambda m: m.norm_ratio),
    _Column("drift", lambda m: m.drift),
    _Column("Φ left", lambda m: m.phi_left),
    _Column("Φ right", lambda m: m.phi_right),
    _Column("above chance", lambda m: m.above),
    _Column("mixed", lambda m: m.mixed, ".0%"),
)

LEGEND = (
    ("kept", "share of the update's energy ‖ΔW‖² left on the target"),
    ("vs copy", "distance to the unchanged update, in units of its norm"),
    ("norm", "ratio of norms, target to source"),
    ("drift", "‖W_t − W_s‖/‖W_s‖ of the bases' weights"),
    ("Φ", "overlap of the bases' leading subspaces, left and right"),
    ("above chance", "the lesser Φ over what unrelated weights score, 0 … 1"),
    ("mixed", "share of energy in the update's mixed blocks"),
    ("angle", "median principal angle of the side that is farther apart"),
    ("energy", "share of the LoRA's energy"),
)


def write_reasons(report: Report) -> Html | None:
    """Why modules have no place in the output; None where all of them have one."""
    reasons = sorted(report.reasons().items(), key=lambda item: -item[1])
    if not reasons:
        return None
    rows = [
        tag("tr", number_cell(count), tag("td", status), tag("td", reason))
        for (status, reason), count in reasons
    ]
    return write_table([number_head("modules"), "status", "why"], rows, "Modules that did not move")


@dataclass(frozen=True)
class _RowColumn:
    """A number of the table of modules; None where a module has none."""

    name: str
    value: Callable[[ModuleReport], float | None]
    form: str = ".2f"


def _measured(value: Callable[[Measures], float]) -> Callable[[ModuleReport], float | None]:
    """The number of a projected module."""
    return lambda row: None if row.measures is None else value(row.measures)


_ROW_COLUMNS = (
    _RowColumn("kept", lambda r: r.surviving_energy * (1 - r.rank_cut_energy), ".0%"),
    _RowColumn("vs copy", lambda r: r.copy_distance),
    _RowColumn("norm", lambda r: r.norm_ratio),
    _RowColumn("drift", lambda r: r.drift),
    _RowColumn("Φ left", _measured(lambda m: m.phi_left)),
    _RowColumn("Φ right", _measured(lambda m: m.phi_right)),
    _RowColumn("angle", _measured(lambda m: math.degrees(m.angle)), ".0f"),
    _RowColumn(
        "mixed",
        _measured(lambda m: m.range_null_energy + m.null_range_energy),
        ".0%",
    ),
)


def module_table(report: Report) -> Html:
    """A row for every module of the LoRA; the script makes it sortable and filterable."""
    mapped = report.rows("mapped")
    shown = [] if report.dry_run else mapped
    columns = [
        column
        for column in _ROW_COLUMNS
        if any(write_number(column.value(row)) != NOTHING for row in shown)
    ]
    total = sum(row.energy for row in report.modules)
    is_renamed = any(row.target not in (None, row.source) for row in report.modules)
    numbers = [column.name for column in columns] + (["energy"] if total else [])
    numbers += ["rank in", "rank out", "shape"]
    heads = ["module", *(["target"] if is_renamed else []), "status", *map(number_head, numbers)]
    rows = []
    for i in PlaceMap(report.modules).order:
        row = report.modules[i]
        cells = [name_cell(row.source)]
        if is_renamed:
            cells.append(tag("td", break_name(row.target) if row.target else NOTHING))
        cells.append(tag("td", row.status, class_=row.status))
        moved = row.status == "mapped"
        for column in columns:
            value = column.value(row) if moved else None
            cells.append(number_cell(write_number(value, column.form)))
        if total:
            cells.append(number_cell(write_number(row.energy / total, ".2%")))
        rank = str(row.rank_out) if moved else NOTHING
        shape = "×".join(map(str, row.shape)) or NOTHING
        cells += [number_cell(row.rank_in or NOTHING), number_cell(rank), number_cell(shape)]
        rows.append(tag("tr", *cells, tag("td", row.reason), id=f"m{i}"))
    return write_table([*heads, "why"], rows, "Every module of the LoRA", id="modules")


def describe_module(row: ModuleReport, is_planned: bool = False) -> str:
    """A module in a line: its name, what became of it and why.

    Args:
        row: the module.
        is_planned: whether it has not been moved yet.
    """
    if row.status != "mapped":
        return f"{row.source}: {row.status}, {row.reason}"
    share = row.surviving_energy * (1 - row.rank_cut_energy)
    is_known = not (is_planned or math.isnan(share))
    kept = f" {write_number(share, '.0%')} kept," if is_known else ""
    onto = f" to {row.target}," if row.target not in (None, row.source) else ""
    return f"{row.source}:{onto}{kept} {row.reason}"
