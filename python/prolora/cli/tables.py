"""How a terminal draws a table and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from .console import PlainConsole

if TYPE_CHECKING:
    from ..reports.report import Sentence
    from ..reports.table import Table

MARKS = {"✔": "bold green", "⚠": "bold yellow", "✖": "bold red"}
TONES = {"total": "bold", "warn": "yellow", "faint": "dim", "": None}


def draw_table(table: Table) -> RichTable:
    """Makes rich's table in the house style, for 80 columns."""
    drawn = RichTable(
        title=table.title or None,
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    for column in table.columns:
        if column.form is None:
            drawn.add_column(column.name, overflow="fold")
        else:
            drawn.add_column(column.name, justify="right", no_wrap=True)
    for row in table.rows:
        texts = map(lambda column, cell: column.write(cell), table.columns, row.cells)
        drawn.add_row(*texts, style=TONES[row.tone])
    return drawn


def draw_facts(facts: Iterable[tuple[str, str]]) -> RichTable:
    """Makes a table of names with texts, one a line."""
    drawn = RichTable.grid(padding=(0, 2, 0, 0))
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, text in facts:
        drawn.add_row(name, text)
    return drawn


def show_tables(console: PlainConsole, tables: Sequence[Table]) -> None:
    """Prints tables, and once below them what their columns mean."""
    for table in tables:
        console.print_table(draw_table(table))
    terms = {name: text for table in tables for name, text in table.legend().items()}
    if terms:
        console.print_note("; ".join(f"{name}: {text}" for name, text in terms.items()) + ".")


def show_words(console: PlainConsole, words: Sentence) -> None:
    """Prints a verdict: first what to expect, last what was lost."""
    console.print(f"{words.mark} {words.headline}", style=MARKS[words.mark])
    for line in words.lines:
        console.print(line)
    for line in words.cautions:
        console.print(line, style="yellow")
