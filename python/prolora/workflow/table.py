"""A table as data: title, columns and rows. A terminal and a page draw the same one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .glossary import GLOSSARY
from .place_map import PlaceMap

NOTHING = "–"

Cell = str | float | None
"""A text, a number that its column writes, or nothing."""

Tone = Literal["", "total", "warn", "faint"]


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: the heading; its meaning is in the glossary, if it has one there.
        form: how numbers are written (".2f"); None for a column of texts.
        has_bar: whether a page draws a bar beside each number, which is a share.
    """

    name: str
    form: str | None = None
    has_bar: bool = False

    def write(self, cell: Cell) -> str:
        """A cell as text; a dash where there is nothing."""
        return cell if isinstance(cell, str) else write_number(cell, self.form or "")


@dataclass(frozen=True)
class Below:
    """What a page shows in a row below its name: the map of a LoRA, and what to read about it."""

    map: PlaceMap | None = None
    sentences: tuple[str, ...] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        cells: one for each column.
        tone: how it stands out.
        anchor: by which the map of a page leads to it.
        below: what a page shows below its name.
    """

    cells: tuple[Cell, ...]
    tone: Tone = ""
    anchor: str = ""
    below: Below | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: what it shows.
        columns: from left to right.
        rows: from top to bottom.
        note: what is to be known of all of it.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def legend(self) -> dict[str, str]:
        """Column -> what it means, where the glossary says it."""
        names = (
            column.name.split(" ")[0] if column.name[0] in "Φ≥" else column.name
            for column in self.columns
        )
        return {name: GLOSSARY[name] for name in names if name in GLOSSARY}


def make_table(title: str, columns: Sequence[Column], rows: Iterable[Row], note: str = "") -> Table:
    """A table without those columns of numbers in which no row has one."""
    rows = tuple(rows)
    kept = [
        i
        for i, column in enumerate(columns)
        if column.form is None or any(column.write(row.cells[i]) != NOTHING for row in rows)
    ]
    shown = (replace(row, cells=tuple(row.cells[i] for i in kept)) for row in rows)
    return Table(title, tuple(columns[i] for i in kept), tuple(shown), note)


def write_number(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash where there is none."""
    return NOTHING if value is None or value != value else format(value, form)


def write_extremes(numbers: Iterable[int]) -> str:
    """The least and the greatest of some numbers; one where they are equal."""
    ordered = sorted(numbers)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]}…{ordered[-1]}"
