"""A table as data: a terminal and a page draw the same one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .glossary import GLOSSARY

NOTHING = "–"

Cell = str | float | None
"""A text, a number that its column writes, or nothing."""

Tone = Literal["", "total", "warn", "faint"]


@dataclass(frozen=True)
class Column:
    """One column of a table: heading and number format."""

    name: str  # the heading; its meaning is in the glossary, if it has one there
    form: str | None = None  # how numbers are written (".2f"); None for a column of texts
    has_bar: bool = False  # a page draws a bar beside each number, which is a share

    def write(self, cell: Cell) -> str:
        """Writes a cell as text; a dash for nothing."""
        return cell if isinstance(cell, str) else write_number(cell, self.form or "")


@dataclass(frozen=True)
class Row:
    """One row of a table, with its look on a page."""

    cells: tuple[Cell, ...]  # one for each column
    tone: Tone = ""  # how it stands out
    anchor: str = ""  # by which the map of a page leads to it
    below: tuple[str, ...] = ()  # what a page says of it on request


@dataclass(frozen=True)
class Table:
    """A table of texts and numbers for terminals and pages."""

    title: str  # what it shows
    columns: tuple[Column, ...]  # from left to right
    rows: tuple[Row, ...]  # from top to bottom
    id: str = ""  # by which a page, its style and its script find it

    def legend(self) -> dict[str, str]:
        """Returns column -> its meaning from the glossary."""
        names = (
            column.name.split(" ")[0] if column.name[0] == "Φ" else column.name
            for column in self.columns
        )
        return {name: GLOSSARY[name] for name in names if name in GLOSSARY}


def make_table(title: str, columns: Sequence[Column], rows: Iterable[Row], id: str = "") -> Table:
    """Makes a table without empty columns of numbers."""
    rows = tuple(rows)
    kept = [
        i
        for i, column in enumerate(columns)
        if column.form is None or any(column.write(row.cells[i]) != NOTHING for row in rows)
    ]
    shown = (replace(row, cells=tuple(row.cells[i] for i in kept)) for row in rows)
    return Table(title, tuple(columns[i] for i in kept), tuple(shown), id)


def write_number(value: float | None, form: str = ".2f") -> str:
    """Writes a number, or a dash for none."""
    return NOTHING if value is None or value != value else format(value, form)


def write_extremes(numbers: Iterable[int]) -> str:
    """Writes the least and the greatest number, or one if equal."""
    ordered = sorted(numbers)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]}…{ordered[-1]}"
