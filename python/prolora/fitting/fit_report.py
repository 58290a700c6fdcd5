"""Reports of a LoRA that was fitted to running models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..moving.transfer_report import LITTLE, TransferReport, name_amount, tell_place
from ..reports.lora_report import MovedReport
from ..reports.module_report import split_modules
from ..reports.report import InWords, Mark
from ..reports.table import Table
from .fit_numbers import ProbeReport


@dataclass(frozen=True, repr=False, kw_only=True)
class FitReport(MovedReport):
    """What a fit did, and how well.

    Attributes:
        rank_rule: the rank that was asked for; 0 for the LoRA's own.
        probe: what the fit found; None in a dry run.
        work: what it would ask of the models, in a sentence; of a dry run alone.
    """

    eyebrow: ClassVar[str] = "LoRA fit report"

    rank_rule: int | float = 0
    probe: ProbeReport | None = None
    work: str = ""

    @property
    def share_of_rival(self) -> float | None:
        """What the LoRA moved by weights does on the same samples; None where none was."""
        gate = self.probe.gate if self.probe else None
        return min(gate.copy_share.values()) if gate and gate.copy_share is not None else None

    def _judge(self) -> InWords:
        """Tells what the fit does on samples that it did not see."""
        cautions = tuple(self.cautions())
        if self.probe is None:
            return replace(self._tell_plan(), cautions=cautions)
        gate, why = self.probe.gate, [self.why] if self.why else []
        lines = [f"prolora ran both models and fitted a new LoRA of {self.target}."]
        if gate is not None:
            share = max(0.0, min(gate.share.values()))
            does = f"does {name_amount(share).lower()} ({share:.0%}) of what the LoRA does to"
            seen = f"On samples that the fit did not see it {does} {self.source}."
            lines.insert(0, seen)
        if gate is not None and gate.decision == "refuse":
            step = "Next: draw some images with it and without it before you use it."
            headline = "Do not expect much: the fit did not succeed."
            return InWords("⚠", headline, (*lines, *why, step), cautions)
        step = "Next: try it at strength 1, and less where it is too strong."
        headline = f"This should work on {self.target}."
        return InWords("✔", headline, (*lines, *why, step), cautions)

    def _tell_plan(self) -> InWords:
        """Tells how much of the LoRA has a place; headers say no more."""
        names, there = split_modules(self.modules)
        placed = self.totals["energy_mapped"]
        if placed is None:
            placed = len(there) / len(names) if names else 0.0
            place = f"{len(there)} of the LoRA's {len(names)} parts have a place on {self.target}."
        else:
            place = tell_place(placed, None, self.target)
        mark: Mark = "✔" if placed >= LITTLE else "⚠"
        lines = tuple(filter(None, (place, self.why)))
        return InWords(mark, "A dry run: nothing was written.", lines)

    def sentences(self) -> list[str]:
        """Tells what was fitted, and what held-out samples say of it."""
        told = super().sentences() + ([self.work] if self.work else [])
        return told + (self.probe.sentences() if self.probe else [])

    def tables(self) -> list[Table]:
        """Tabulates what did not move."""
        found = super().tables()
        if self.rows("mapped") and not self.dry_run:
            del found[0]  # which compares each part with a copy
        return found


@dataclass(frozen=True, repr=False, kw_only=True)
class RivalReport(TransferReport):
    """What a move by weights kept, where a fit was no better.

    Attributes:
        probe: what the fit found.
    """

    probe: ProbeReport

    def _tell_method(self) -> str:
        none = (
            "A fit to the running models was no better on samples that it did not see, so this is "
            "the LoRA moved by the weights alone."
        )
        return f"{none} {super()._tell_method()}".rstrip()

    def sentences(self) -> list[str]:
        """Tells what the fit found, and then what the weights gave."""
        told, done = super().sentences(), super(TransferReport, self).sentences()
        so = (
            f"So the LoRA moved by weights alone ('{self.method}') is written, at the strength "
            "that suits it best there."
        )
        return [*done, *self.probe.sentences(), so, *told[len(done) :]]
