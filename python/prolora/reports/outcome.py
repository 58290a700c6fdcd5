"""What became of one LoRA: the report, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ProLoRAError
from ..files.hub import spell_path
from .lora_report import LoraReport
from .report import InWords

OutcomeStatus = Literal["failed", "already there", "would move", "moved"]
"""What became of a LoRA, in two words."""


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
    def words(self) -> InWords:
        """The verdict, or the error."""
        return self.report.in_words() if self.report else InWords("✖", str(self.error))

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
        return "would move" if self.planned else "moved"

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
