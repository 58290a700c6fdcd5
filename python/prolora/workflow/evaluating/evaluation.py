"""What an evaluation found: scores, how sure they are, and what they mean in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ...version import __version__
from ..in_words import InWords, Mark
from ..page.document import Page, PictureGrid, Section, render_page
from ..table import Column, Row, Table, make_table
from .drawing import Cell
from .entrants import COPY, SOURCE, TARGET, TRAINED, WITH_LORA, Subject
from .statistics import Estimate

FEW = 16
"""Images of each row below which intervals are too narrow to be believed."""

Sides = tuple[list[str], list[str]]
"""What speaks for a row and what against it, in words."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The scores of what was drawn.

    Attributes:
        source, target: names of the models.
        subjects: the LoRAs.
        seeds: of the images of each prompt.
        rows: that all LoRAs have, in order.
        scores: score -> row -> values [LoRAs, prompts, seeds].
        changes: row -> how far its images are from the bare model's of the same noise: the root
            mean square of the pixels' differences, 0 … 1, in the same shape.
        lower: the scores of which less is better.
        reference: what images were compared with, in words.
        skipped: metric or row -> why it is not there.
        images: what was drawn -> its file.
        settings: of the sampling.
        grid: some of the images.
    """

    source: str
    target: str
    subjects: tuple[Subject, ...]
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Tensor]]
    changes: Mapping[str, Tensor]
    lower: frozenset[str]
    reference: str
    skipped: Mapping[str, str]
    images: Mapping[Cell, str]
    settings: Mapping[str, object]
    grid: PictureGrid | None = None
    _known: dict[tuple[str, str, str], Estimate] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: how much was drawn, and the verdict."""
        return f"Evaluation({len(self.images)} images: {self.in_words().headline})"

    @property
    def count(self) -> int:
        """Images of each row."""
        return len(self.subjects) * len(self.subjects[0].prompts) * len(self.seeds)

    @cached_property
    def candidates(self) -> tuple[str, ...]:
        """The rows that are compared with the copy."""
        fixed = (SOURCE, WITH_LORA, TARGET, COPY, TRAINED)
        return tuple(row for row in self.rows if row not in fixed) if COPY in self.rows else ()

    def estimate(self, score: str, row: str, other: str = "") -> Estimate | None:
        """The mean of a row, or of its differences to another; None where one has no such score."""
        known = self.scores[score]
        if row not in known or (other and other not in known):
            return None
        key = (score, row, other)
        if key not in self._known:
            self._known[key] = Estimate.of(known[row] - known[other] if other else known[row])
        return self._known[key]

    def find_share(self, score: str, row: str) -> float | None:
        """The share of the way from the bare target to the trained LoRA; None if that is no way."""
        whole, part = (self.estimate(score, name, TARGET) for name in (TRAINED, row))
        return part.mean / whole.mean if whole and part and whole.sign else None

    def find_norm(self, row: str) -> float | None:
        """‖ΔW‖ of a row over that of the LoRA on its source, the mean over LoRAs; None without."""
        ratios = [
            subject.entrants[row].norm / max(subject.entrants[WITH_LORA].norm, 1e-30)
            for subject in self.subjects
        ]
        return sum(ratios) / len(ratios) if any(ratios) else None

    def compare(self, row: str, other: str) -> Sides:
        """Differences between two rows that the intervals show."""
        sides: Sides = ([], [])
        for score in self.scores:
            found = self.estimate(score, row, other)
            if found and found.sign:
                better = (found.sign > 0) != (score in self.lower)
                sides[not better].append(
                    f"{score} {found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
                )
        return sides

    def in_words(self) -> InWords:
        """The verdict: what is better than the copy, and what the images cannot show."""
        cautions = [f"{name} is left out: {why}." for name, why in self.skipped.items()]
        if self.count < FEW:
            cautions.append(
                f"Each row has {self.count} images: so few make the intervals too narrow."
            )
        for row in self.rows:
            unheard = max(subject.entrants[row].unheard for subject in self.subjects)
            if unheard:
                cautions.append(
                    f"{row}: {unheard} biases, norms or updates that cannot be run are not drawn."
                )
        if not self.scores:
            headline = "The images are drawn, and no metric judged them: look at the page."
            return InWords("⚠", headline, (), tuple(cautions))
        mark, headline = self._judge()
        lines = [
            _tell(row, "the copy", self.compare(row, COPY), self.count) for row in self.candidates
        ]
        for row in (COPY, TRAINED):
            if row in self.rows:
                sides = self.compare(row, TARGET)
                lines.append(_tell(row, f"{self.target} alone", sides, self.count))
        lines.append(self._tell_power())
        return InWords(mark, headline, tuple(filter(None, lines)), tuple(cautions))

    def _judge(self) -> tuple[Mark, str]:
        sides = {row: self.compare(row, COPY) for row in self.candidates}
        best = [row for row, (better, worse) in sides.items() if better and not worse]
        mixed = [row for row, (better, worse) in sides.items() if better and worse]
        if best:
            return "✔", f"Better than the copied LoRA: {', '.join(best)}."
        if mixed:
            return "⚠", f"Better than the copied LoRA in some scores, worse in others: {mixed[0]}."
        if self.candidates:
            told = "none is better" if any(w for _, w in sides.values()) else "no difference shows"
            return "⚠", f"The copied LoRA is as good as any here: {told}."
        if COPY not in self.rows:
            return "⚠", f"The LoRA cannot be copied to {self.target}: see the scores."
        better, worse = self.compare(COPY, TARGET)
        if better and not worse:
            return "✔", f"The copied LoRA works on {self.target}."
        if better:
            return "⚠", f"The copied LoRA works on {self.target}, and costs something."
        return "⚠", f"The copied LoRA does not improve on {self.target} alone."

    def _tell_power(self) -> str:
        """What so many images can show."""
        other = COPY if self.candidates else TARGET
        rows = self.candidates or tuple(row for row in (COPY, TRAINED) if row in self.rows)
        parts = []
        for score in self.scores:
            found = [self.estimate(score, row, other) for row in rows]
            sizes = [x.smallest for x in found if x is not None and x.smallest is not None]
            if sizes:
                parts.append(f"{score} {max(sizes):.3f}")
        if not parts:
            return ""
        return (
            f"With {self.count} images of each row, differences smaller than these can stay "
            f"hidden: {', '.join(parts)}. Half of that takes four times as many images."
        )

    def tables(self) -> list[Table]:
        """The means, and the differences to the copy."""
        scored = [row for row in self.rows if row != SOURCE]
        columns = [Column("row"), Column("norm", ".2f"), Column("change", ".3f")]
        columns += [Column(score, ".3f") for score in self.scores]
        means = []
        for row in scored:
            numbers = [Estimate.of(self.changes[row]).mean if row in self.changes else None]
            for score in self.scores:
                found = self.estimate(score, row)
                numbers.append(found.mean if found else None)
            means.append(Row((row, self.find_norm(row), *numbers)))
        note = (
            f"Compared with {self.reference}. A weak LoRA leaves the quality of the target alone: "
            "read scores of quality beside norm and change."
        )
        if self.lower:
            note += f" Less is better in {', '.join(sorted(self.lower))}."
        names = ("− copy", "low", "high", "smallest")
        columns_of_differences = [Column("row"), Column("score")]
        columns_of_differences += [Column(name, "+.3f") for name in names[:3]]
        columns_of_differences += [Column("smallest", ".3f"), Column("share", ".2f")]
        rows = []
        for row in (*self.candidates, *(r for r in (TRAINED, TARGET) if r in self.rows)):
            for score in self.scores:
                if found := self.estimate(score, row, COPY):
                    cells = (found.mean, found.low, found.high, found.smallest)
                    rows.append(Row((row, score, *cells, self.find_share(score, row))))
        tables = [make_table(f"{self.count} images of each row", columns, means, note)]
        if rows:
            told = "95 % intervals over LoRAs, prompts and seeds, not corrected for their number."
            tables.append(make_table("Differences to the copy", columns_of_differences, rows, told))
        return tables

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        words = self.in_words()
        rows: dict[str, Any] = {}
        for row in self.rows:
            rows[row] = {"norm": self.find_norm(row), "scores": {}}
            if row in self.changes:
                rows[row]["change"] = Estimate.of(self.changes[row]).to_dict()
            for score in self.scores:
                if found := self.estimate(score, row):
                    difference = self.estimate(score, row, COPY) if COPY in self.rows else None
                    rows[row]["scores"][score] = found.to_dict() | {
                        "minus_copy": difference.to_dict() if difference else None,
                        "share": self.find_share(score, row),
                    }
        return {
            "prolora": __version__,
            "verdict": {"mark": words.mark, "headline": words.headline, "lines": words.lines},
            "cautions": words.cautions,
            "source": self.source,
            "target": self.target,
            "loras": {subject.name: subject.prompts for subject in self.subjects},
            "seeds": self.seeds,
            "settings": self.settings,
            "reference": self.reference,
            "skipped": self.skipped,
            "lower_is_better": sorted(self.lower),
            "rows": rows,
            "images": [self._describe_cell(cell, name) for cell, name in self.images.items()],
        }

    def _describe_cell(self, cell: Cell, name: str) -> dict[str, Any]:
        index = self._find_place(cell)
        values = {score: rows[cell.row] for score, rows in self.scores.items() if cell.row in rows}
        if cell.row in self.changes:
            values["change"] = self.changes[cell.row]
        scores = {score: float(value[index]) for score, value in values.items()}
        return {**cell.__dict__, "file": name, "scores": scores}

    def _find_place(self, cell: Cell) -> tuple[int, int, int]:
        """LoRA, prompt and seed of a cell, as indices."""
        names = [subject.name for subject in self.subjects]
        lora = names.index(cell.subject)
        prompt = self.subjects[lora].prompts.index(cell.prompt)
        return lora, prompt, self.seeds.index(cell.seed)

    def to_html(self, facts: Mapping[str, str] | None = None) -> str:
        """One page: the verdict, the images and the tables; it loads nothing.

        Args:
            facts: more of how it was made, by what each is called: the command.
        """
        words = self.in_words()
        loras = ", ".join(subject.name for subject in self.subjects)
        known = {"LoRA": loras, "source": self.source, "target": self.target}
        known |= {name: str(value) for name, value in self.settings.items()}
        page = Page(
            title=f"{loras} on {self.target}",
            eyebrow="LoRA evaluation",
            headline=f"{words.mark} {words.headline}",
            lines=(*words.lines, *words.cautions),
            grid=self.grid,
            sections=[Section("Scores", [part for t in self.tables() for part in (t, t.note)])],
            facts=known | dict(facts or {}),
        )
        return render_page(page)


def _tell(row: str, other: str, sides: Sides, count: int) -> str:
    """What the intervals show of a row, in a sentence."""
    better, worse = map(", ".join, sides)
    if better and worse:
        return f"{row} is better than {other} in {better}, and worse in {worse}."
    if better or worse:
        return f"{row} is {'better' if better else 'worse'} than {other}: {better or worse}."
    return f"{row} and {other}: {count} images of each show no difference."
