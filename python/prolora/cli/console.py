"""Where the commands print: text of files is shown as it is, and never obeyed.

Module names, metadata and file names are written by others. Rich would read `[red]` in them as
markup, and a terminal would obey escape sequences. So every string that is printed here is plain
text, without control characters; style comes from arguments and never from the text.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..errors import ProLoRAError, name_options
from .flags import write_flag

ShowProgress = Callable[[int, int, str], None]
TABLE_WIDTH = 80
"""Columns that every table fits into."""

# C0 and C1 controls, marks of direction, line and paragraph separators, half characters.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SUBSTITUTES = {
    "✔": "OK:",
    "⚠": "Careful:",
    "✖": "No:",
    "→": "->",
    "…": "...",
    "–": "-",
    "−": "-",
    "×": "x",
    "·": "*",
    "≥": ">=",
    "≤": "<=",
    "‖": "||",
    "⟨": "<",
    "⟩": ">",
    "²": "^2",
    "°": " deg",
    "Φ": "Phi",
    "σ": "sigma",
    "Σ": "sum ",
    "Δ": "Delta",
}
"""What stands for a character that the output's encoding lacks."""


def make_printable(text: str, encoding: str = "utf-8") -> str:
    r"""Spells out control characters (`\x1b`) and what `encoding` cannot hold."""
    plain = _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    try:
        plain.encode(encoding)
    except UnicodeEncodeError:
        printable = "".join(
            _SUBSTITUTES.get(c, c) if c.encode(encoding, "ignore") == b"" else c for c in plain
        )
        return printable.encode(encoding, "replace").decode(encoding)
    return plain


class PlainConsole(Console):
    """A console that takes every string as plain text, in tables too."""

    def __init__(self, *, stderr: bool = False) -> None:
        """Opens a console on standard output, or on standard error."""
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Renders a string of rich with printable characters and flags."""
        named = name_options(text, write_flag)
        return super().render_str(make_printable(named, self.encoding), **options)

    def print_line(self, text: str, style: str | None = None) -> None:
        """Prints a line that may be longer than the terminal, as paths are."""
        self.print(text, style=style, soft_wrap=True)

    def print_note(self, text: str) -> None:
        """Prints an explanation below a table, its lines filled anew."""
        self.print(" ".join(text.split()), style="dim")

    def print_table(self, table: Table) -> None:
        """Prints a table; below 80 columns its rows go on where the terminal breaks them.

        Rich would cut cells instead, and leave out columns.
        """
        wide = self.options.update(width=max(self.width, TABLE_WIDTH))
        natural = Measurement.get(self, wide, table).maximum
        if natural > self.width:
            table.width = natural
        self.print(table, crop=False)


out = PlainConsole()
err = PlainConsole(stderr=True)


class JsonAnswer:
    """What `--json` prints: one document, which is the error where nothing else was printed."""

    def __init__(self) -> None:
        """Begins with nothing printed."""
        self._given = False

    def begin(self) -> None:
        """Forgets what the command before this one printed."""
        self._given = False

    def write(self, content: object) -> None:
        """Prints what a command found."""
        self._given = True
        print(json.dumps(content, indent=1))

    def write_error(self, error: BaseException) -> None:
        """Prints why a command failed, if it was asked for JSON and has printed none."""
        # Reads the words themselves, since the command line may be what is refused.
        words = itertools.takewhile(lambda word: word != "--", sys.argv[1:])
        if isinstance(error, ProLoRAError) and "--json" in words and not self._given:
            self.write({"error": error.to_dict()})


answer = JsonAnswer()


class PlainFormatter(logging.Formatter):
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats the record's text, line by line."""
        text = name_options(super().format(record), write_flag)
        return "\n".join(map(make_printable, text.split("\n")))


def prepare_streams() -> None:
    """Lets no character that the streams' encoding lacks stop a command; sends the log to stderr.

    Standard output that goes to a file has the locale's encoding, on Windows often cp1252.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


_LORAS = re.compile(r"LoRA (\d+) of (\d+): ")


def weight_stages(show: ShowProgress, stages: Mapping[str, float]) -> ShowProgress:
    """Maps the stages of a job to one bar, which never goes back.

    `stages` is how the names of a stage begin -> its share of the time, in their order; "" has all
    other names.
    """
    reached = 0.0

    def update(done: int, total: int, name: str) -> None:
        nonlocal reached
        counted = _LORAS.match(name)
        this, count = (int(counted[1]), int(counted[2])) if counted else (1, 1)
        what = name[counted.end() if counted else 0 :]
        words = [*stages]
        at = next((i for i, word in enumerate(words) if word and what.startswith(word)), None)
        at = words.index("") if at is None else at
        share = sum(stages[word] for word in words[:at])
        share += stages[words[at]] * done / max(1, total)
        reached = max(reached, (this - 1 + share) / count)
        show(round(1000 * reached), 1000, name)

    return update


@contextmanager
def progress_bar(title: str, shown: bool = True, timed: bool = True) -> Iterator[ShowProgress]:
    """Yields progress(done, total, name), which draws a bar on a terminal's stderr.

    `timed` also estimates the time that is left; False where the names say it.
    """
    if not (shown and err.is_terminal):
        yield lambda done, total, name: None
        return
    from rich import progress as rich

    columns: tuple[rich.ProgressColumn, ...] = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=24),
        rich.TextColumn("{task.percentage:>3.0f}%"),
        *([rich.TimeRemainingColumn()] if timed else []),
        rich.TextColumn("{task.fields[name]}", style="dim", justify="left", markup=False),
    )
    with rich.Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=None, name="")

        def update(done: int, total: int, name: str) -> None:
            # The rest of a line beside title, bar, count and time.
            room = max(12, err.width - len(title) - (44 if timed else 35))
            end = make_printable(name, err.encoding)[-room:]
            bar.update(task, completed=done, total=total, name=end)

        yield update
