"""The report of a LoRA that was extracted, converted or merged."""

from __future__ import annotations

from dataclasses import dataclass

from ..reports.lora_report import ENOUGH, LoraReport, count_things
from ..reports.report import Mark, Sentence
from .bake_report import BakedModule


@dataclass(frozen=True, repr=False, kw_only=True)
class MadeReport(LoraReport):
    """What a LoRA holds of what it was made of."""

    original: str  # what it was made of, in words
    advice: str = ""  # what to do next; "" without advice
    rounding: BakedModule | None = None  # what is left of the updates in the type of the file

    @property
    def share_held(self) -> float | None:
        """The share of the original's energy that the LoRA holds; None where it is not known."""
        there, lost = self.totals["energy_mapped"], self.totals["energy_cut"]
        return None if there is None or lost is None else there * (1 - lost)

    def in_words(self) -> Sentence:
        """Returns the share of the original that the LoRA holds."""
        share, cautions = self.share_held, tuple(self.cautions())
        if self.dry_run:
            return Sentence("✔", "A dry run: nothing was written.", (), cautions)
        if share is None:
            return Sentence("⚠", "The result changes nothing: it is zero.", (), cautions)
        residual = 100 * max(0.0, 1 - share) ** 0.5
        lost = f"{residual:.3g}%" if residual >= 1e-3 else "less than 0.001%"
        original = f"what was read of {self.original}" if self.unread else self.original
        headline = f"It holds {share:.2%} of the energy of {original}, and differs from it by "
        mark: Mark = "✔" if share >= ENOUGH else "⚠"
        sentence = Sentence(mark, f"{headline}{lost}.", tuple(self.lines()), cautions)
        missing = f"{count_things(self.unread, 'update')} of the file could not be read."
        return sentence.after([missing]) if self.unread else sentence

    def lines(self) -> list[str]:
        """Lists what else to know of the result."""
        lines = [self.advice] if self.advice else []
        if self.rounding is not None:
            left, error = self.rounding.survived, self.rounding.error
            lines.append(f"Rounding leaves {left:.2%} of that, with an error of {error:.2g}.")
        return lines

    def _describe_done(self) -> str:
        done = f"{self.method.removesuffix('e')}ed"
        return f"{'would be' if self.dry_run else 'were'} {done}"
