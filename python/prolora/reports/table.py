"""A table as data: a terminal and a page draw the same one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

NOTHING = "–"

GLOSSARY = {
    "target": "the model that it moves to",
    "kept": "share of the update's energy ‖ΔW‖² that is on the target",
    "vs copy": "distance to the unchanged update, in units of its norm",
    "norm": "ratio of the norms of the update, target to source",
    "drift": "‖W_t − W_s‖/‖W_s‖ of the two models' weights: 0 if equal, 1.4 if trained apart",
    "Φ": "overlap of the leading subspaces of the two models' weights, left and right, 0 … 1",
    "above": "the lesser Φ over chance: 0 as unrelated, 1 as equal weights",
    "mixed": "share of the energy in the update's mixed blocks, which projecting drops",
    "angle": (
        "the median … the largest angle between the leading subspaces, on the side that is farther "
        "apart"
    ),
    "energy": "share of ‖ΔW‖², which says how much an update does",
    "score": "how alike the paired blocks are",
    "margin": "the lead of the score over the second best block",
    "cosine of updates": "⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖‖ΔW_b‖) of two LoRAs: 1 if equal, −1 if opposite",
    "write alike": "overlap Φ of the directions that two LoRAs write, 0 … 1",
    "read alike": "overlap Φ of the directions that two LoRAs read, 0 … 1",
    "cancel": "modules in which two LoRAs work against each other",
    "double": "modules in which two LoRAs do the same thing",
}
"""Term in tables and pages -> what it means."""

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
        if isinstance(cell, str):
            return cell
        return NOTHING if cell is None or cell != cell else format(cell, self.form or "")


@dataclass(frozen=True)
class Row:
    """One row of a table, with its look on a page."""

    cells: tuple[Cell, ...]  # one for each column
    tone: Tone = ""  # how it stands out
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
    filled = [
        i
        for i, column in enumerate(columns)
        if column.form is None or any(column.write(row.cells[i]) != NOTHING for row in rows)
    ]
    shown = (replace(row, cells=tuple(row.cells[i] for i in filled)) for row in rows)
    return Table(title, tuple(columns[i] for i in filled), tuple(shown), id)


def write_extremes(numbers: Iterable[int]) -> str:
    """Writes the least and the greatest number, or one if equal."""
    ordered = sorted(numbers)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]}…{ordered[-1]}"
