"""A report: a document that knows no verb, drawn by a terminal, a page and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ..core.controls import replace_controls
from ..files.jsontext import replace_nonfinite

if TYPE_CHECKING:  # `check` of a file imports little
    from .table import Table

Mark = Literal["✔", "⚠", "✖"]
NameOption = Callable[[str], str]
"""Names options in a text as its reader does: by flags, by widgets."""

MADE_BEFORE = "✔ It was made of the same in the same way."
"""What is told of a kept result whose header has no verdict."""

STRENGTHS = r"Load it at strength ([\d.]*\d(?:,? (?:to|and|try) (?:try )?[\d.]*\d)*)"
"""How an advice begins that names strengths."""

VERDICT = "prolora.verdict"
"""The entry of a header that tells again what was told when the file was written."""


@dataclass(frozen=True)
class Sentence:
    """A verdict in words."""

    mark: Mark  # ✔ it should work, ⚠ do not expect much, ✖ it does not work
    headline: str  # the verdict in a sentence
    lines: tuple[str, ...] = ()  # what to expect, what was done and why, and what to do next
    cautions: tuple[str, ...] = ()  # what was lost, or needs a look

    def __str__(self) -> str:
        """Returns all of it, a sentence a line."""
        text = "\n".join([f"{self.mark} {self.headline}", *self.lines, *self.cautions])
        return replace_controls(text)

    @property
    def strengths(self) -> str:
        """The strengths to load the LoRA at, in the words of the advice; "" without one."""
        match = re.search(STRENGTHS, str(self))
        return match[1] if match else ""

    def after(self, warnings: Sequence[str]) -> Sentence:
        """Returns the verdict with warnings before it."""
        mark: Mark = "⚠" if self.mark == "✔" else self.mark
        return Sentence(
            mark, warnings[0], (self.headline, *warnings[1:], *self.lines), self.cautions
        )


def summarise(where: str, verdicts: Sequence[Sentence]) -> str:
    """Writes a line on several LoRAs: the worst mark, how many, their place, the strengths."""
    mark = max((one.mark for one in verdicts), key="✔⚠✖".index)
    advised = [*dict.fromkeys(one.strengths for one in verdicts if one.strengths)]
    advice = f": load them at strength {'; or '.join(advised)}" if advised else ""
    number = f"{len(verdicts)} LoRA{'s' if len(verdicts) > 1 else ''}"
    return f"{mark} {number} in {where}{advice}"


def read_again(lines: Sequence[str]) -> Sentence:
    """Returns the verdict of an earlier run from its lines; see `Sentence.__str__`."""
    first, *others = lines
    mark: Mark = next((mark for mark in get_args(Mark) if first.startswith(mark)), "⚠")
    return Sentence(mark, f"{first.removeprefix(mark).strip()} (moved before)", (*others,))


@dataclass(frozen=True)
class PictureGrid:
    """Small images side by side."""

    columns: Sequence[str]  # headings
    rows: Sequence[str]  # what each row shows
    images: Sequence[Sequence[bytes]]  # PNG files, column by column
    caption: str  # what is to be seen, in a sentence


def is_page_path(path: str | PathLike[str]) -> bool:
    """Returns whether a report of that name is an HTML page."""
    return Path(path).suffix.lower() in (".html", ".htm")


class Report:
    """What was done, and what to expect of it; `print` writes its sentences.

    Each verb has its own kind, which adds the numbers that it has.
    """

    eyebrow: ClassVar[str] = "LoRA report"

    @property
    def title(self) -> str:
        """What the report is of."""
        raise NotImplementedError

    def in_words(self) -> Sentence:
        """Returns the verdict for people: what to expect, what was done, what was lost."""
        raise NotImplementedError

    def sentences(self) -> list[str]:
        """Reports the numbers behind the verdict, a sentence each."""
        return []

    def tables(self) -> list[Table]:
        """Tabulates them for a terminal."""
        return []

    def page_tables(self) -> list[Table]:
        """Tabulates them for a page, which has room for every row."""
        return self.tables()

    @property
    def pictures(self) -> PictureGrid | None:
        """What was drawn; None without images."""
        return None

    def facts(self) -> dict[str, str]:
        """Returns how it was made, by name: bases, digests, options."""
        return {}

    def __str__(self) -> str:
        """Writes the verdict in words, then the sentences with the numbers, one a line."""
        return replace_controls("\n".join([str(self.in_words()), "", *self.sentences()]))

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON; NaN becomes None."""
        document = {"in_words": str(self.in_words()).split("\n"), "summary": self.sentences()}
        return replace_nonfinite(self.numbers() | document)  # type: ignore[no-any-return]

    def numbers(self) -> dict[str, Any]:
        """Returns what the report holds, by name."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    def to_json(self) -> str:
        """Writes `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_html(self, facts: Mapping[str, str] | None = None, spell: NameOption = str) -> str:
        """Renders the report as one HTML page without other files or network.

        It has the verdict, the numbers, where in the model they lie, and how the result was made.

        Args:
            facts: more of how it was made, by name: the LoRA's file, the command.
            spell: names options as the reader does; as in Python without it.
        """
        from .page.render import render_page

        return render_page(self, self.facts() | dict(facts or {}), spell)

    def save(
        self, path: str | PathLike[str], *, overwrite: bool = False, spell: NameOption = str
    ) -> None:
        """Writes the report to a file, whole or not at all; what exists is refused.

        Args:
            path: the file; `to_html` if its name ends in .html or .htm, otherwise `to_dict` as
                JSON.
            overwrite: replace what has that name.
            spell: as `to_html` takes it.

        Raises:
            OutputExists: something has that name.
            OutputError: the path cannot be written.
        """
        from ..files.store import put_text

        text = self.to_html(spell=spell) if is_page_path(path) else self.to_json() + "\n"
        put_text(path, text, overwrite=overwrite)
