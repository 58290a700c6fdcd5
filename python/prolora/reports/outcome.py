"""What became of one LoRA, and of several at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..adapters.formats.moves import read_provenance
from ..errors import ProLoRAError, UnsupportedFormat
from ..files.hub import spell_path
from ..files.safetensors_file import SafetensorsFile
from ..files.untrusted import read_text
from .lora_report import LoraReport, MovedReport
from .report import Report, Sentence
from .table import NOTHING, Cell, Column, Row, Table, Tone, make_table

OutcomeStatus = Literal["failed", "already there", "would move", "moved", "would write", "written"]
"""What became of a LoRA, in two words; what is made on the base that it has does not move."""
_DIGESTS = "lora_hash", "source_hash", "target_hash"


@dataclass(frozen=True)
class Outcome:
    """What became of one LoRA: a report, or the error that says why there is none.

    Attributes:
        lora: the input.
        out: where the result is, or would have been.
        report: None if it failed; of what was there already, from headers.
        error: None if it did not fail.
        kept: whether the result was there already, made of the same LoRA in the same way.
        planned: whether it was a dry run.
        seconds: wall time; of what was done for several LoRAs at once, its share.
    """

    lora: Path
    out: Path
    report: LoraReport | None = None
    error: ProLoRAError | None = None
    kept: bool = False
    planned: bool = False
    seconds: float = 0.0

    @property
    def unread(self) -> tuple[str, ...]:
        """Updates of the LoRA that could not be read and stay behind."""
        return self.report.unread if self.report else ()

    @property
    def words(self) -> Sentence:
        """The verdict, or the error."""
        return self.report.in_words() if self.report else Sentence("✖", str(self.error))

    @property
    def share(self) -> float | None:
        """What found a place, 0 … 1."""
        return self.report.totals["energy_mapped"] if self.report else None

    @property
    def status(self) -> OutcomeStatus:
        """In two words."""
        if self.error:
            return "failed"
        if self.kept:
            return "already there"
        if isinstance(self.report, MovedReport):
            return "would move" if self.planned else "moved"
        return "would write" if self.planned else "written"

    def to_dict(self) -> dict[str, Any]:
        """Returns the report, or the error, ready for JSON."""
        entry: dict[str, Any] = {
            "lora": spell_path(self.lora),
            "out": None if self.planned else str(self.out),
            "status": self.status,
        }
        if self.error:
            entry["error"] = self.error.to_dict()
        return entry | (self.report.to_dict() if self.report else {})


@dataclass(frozen=True)
class OutcomesReport(Report):
    """What became of several LoRAs."""

    outcomes: Sequence[Outcome]

    @property
    def title(self) -> str:
        """How many there are, and what became of them."""
        counts = Counter(outcome.status for outcome in self.outcomes)
        summary = ", ".join(f"{count} {status}" for status, count in counts.items())
        return f"{len(self.outcomes)} LoRAs: {summary}"

    def in_words(self) -> Sentence:
        """Returns the title, with the mark of the worst."""
        mark = max((outcome.words.mark for outcome in self.outcomes), key="✔⚠✖".index)
        return Sentence(mark, self.title)

    def tables(self) -> list[Table]:
        """Tabulates what became of each LoRA."""
        columns = Column("LoRA"), Column("status"), *(Column(n, "d") for n in ("mapped", "skipped"))
        columns += Column("refused", "d"), Column("place", ".0%", has_bar=True), Column("s", ".1f")
        rows = [self._describe(outcome) for outcome in self.outcomes]
        return [make_table(self.title, columns, rows, "index")]

    def _describe(self, outcome: Outcome) -> Row:
        words, report = outcome.words, outcome.report
        start = f"{words.mark} {self.name(outcome)}", outcome.status
        below = tuple(str(words).split("\n"))
        if report is None:
            cells = None, None, None, outcome.share, None
            return Row((*start, *cells), "warn", below=below)
        numbers: list[Cell] = [len(report.rows(x)) for x in ("mapped", "skipped", "refused")]
        numbers += [outcome.share, outcome.seconds or NOTHING]
        tone: Tone = "faint" if outcome.kept else ""
        return Row((*start, *numbers), tone, below=(*below, *report.sentences()))

    def name(self, outcome: Outcome) -> str:
        """Returns the LoRA's name, or its result's for one of two experts."""
        several = sum(other.lora == outcome.lora for other in self.outcomes) > 1
        return outcome.out.name if several else outcome.lora.name

    def facts(self) -> dict[str, str]:
        """Returns the facts that are the same for all."""
        facts = [outcome.report.facts() for outcome in self.outcomes if outcome.report]
        first = facts[0] if facts else {}
        return {n: text for n, text in first.items() if all(f.get(n) == text for f in facts)}

    def numbers(self) -> dict[str, Any]:
        """Returns the numbers of each."""
        return {"outcomes": [outcome.to_dict() for outcome in self.outcomes]}


def is_report_of(report: Path, outputs: Iterable[Path]) -> bool:
    """Returns whether a report says the digests in the headers of all outputs that exist."""
    results = [file for file in outputs if file.is_file() and file.suffix == ".safetensors"]
    if not results or not report.is_file():
        return False
    try:
        text = read_text(report)
        origins = [read_provenance(SafetensorsFile(file).metadata) for file in results]
    except UnsupportedFormat:
        return False
    digests = {origin.get(name, "") for origin in origins for name in _DIGESTS}
    return "" not in digests and all(digest in text for digest in digests)
