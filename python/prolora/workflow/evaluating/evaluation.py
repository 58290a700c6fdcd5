"""What an evaluation found: scores, how sure they are, and what they mean in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ...version import __version__
from ..in_words import InWords, Mark
from ..page.document import Page, PictureGrid, Section, render_page
from ..table import Column, Row, Table, make_table
from .drawing import Cell
from .entrants import COPY, SOURCE, TARGET, TRAINED_THERE, WITH_LORA, Subject
from .statistics import Estimate

FEW = 16
"""Images of each row below which intervals are too narrow to be believed."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The scores of what was drawn.

    Attributes:
        source, target: names of the models.
        subjects: the LoRAs.
        seeds: of the images of each prompt.
        rows: that all LoRAs have, in order.
        scores: score -> row -> values [LoRAs, prompts, seeds].
        lower: the scores of which less is better.
        reference: what images were compared with, in words; "" where it could not be drawn.
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
    lower: frozenset[str]
    reference: str
    skipped: Mapping[str, str]
    images: Mapping[Cell, str]
    settings: Mapping[str, object]
    grid: PictureGrid | None = None
    _known: dict[tuple[str, str, str], Estimate] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        """One line: how much was drawn, and the verdict."""
        return f"Evaluation({len(self.images)} images: {self.in_words().headline})"

    @property
    def count(self) -> int:
        """Images of each row."""
        return sum(len(subject.prompts) for subject in self.subjects) * len(self.seeds)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The rows that are compared with the copy."""
        fixed = (SOURCE, WITH_LORA, TARGET, COPY, TRAINED_THERE)
        return tuple(row for row in self.rows if row not in fixed and COPY in self.rows)

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
        whole, part = (self.estimate(score, name, TARGET) for name in (TRAINED_THERE, row))
        return part.mean / whole.mean if whole and part and whole.sign else None

    def find_norm(self, row: str) -> float | None:
        """‖ΔW‖ of a row over that of the LoRA on its source, the mean over LoRAs; None without."""
        ratios = [
            subject.entrants[row].norm / subject.entrants[WITH_LORA].norm
            for subject in self.subjects
            if subject.entrants[WITH_LORA].norm > 0
        ]
        return sum(ratios) / len(ratios) if any(ratios) else None

    def compare(self, row: str, other: str) -> tuple[list[str], list[str]]:
        """Differences to another row that the intervals show: for the better, for the worse."""
        sides: tuple[list[str], list[str]] = ([], [])
        for score in self.scores:
            found = self.estimate(score, row, other)
            if found and found.sign:
                better = (found.sign > 0) != (score in self.lower)
                told = f"{score} {found.mean:+.2g} ({found.low:+.2g} to {found.high:+.2g})"
                sides[not better].append(told)
        return sides

    def in_words(self) -> InWords:
        """The verdict: what is better than the copy, and what the images cannot show."""
        reasons = dict.fromkeys(self.skipped.values())
        named = {
            why: [name for name in self.skipped if self.skipped[name] == why] for why in reasons
        }
        cautions = [f"Left out: {', '.join(x)} ({why.rstrip('.')})." for why, x in named.items()]
        if self.count < FEW:
            cautions.append(f"Images of each row: {self.count}. So few make intervals too narrow.")
        for row in self.rows:
            if unheard := max(subject.entrants[row].unheard for subject in self.subjects):
                cautions.append(
                    f"{row}: {unheard} biases, norms and updates are not drawn, since they cannot "
                    "run beside this model."
                )
        mark, headline = self._judge()
        pairs = [(row, COPY) for row in self.candidates]
        pairs += [(row, TARGET) for row in (COPY, TRAINED_THERE) if row in self.rows]
        lines = [self._tell(*pair) for pair in pairs] if self.scores else []
        sizes = []
        for score in self.scores:
            found = [self.estimate(score, *pair) for pair in pairs[: len(self.candidates) or None]]
            if known := [x.smallest for x in found if x is not None and x.smallest is not None]:
                sizes.append(f"{score} {max(known):.2g}")
        if sizes:
            lines.append(
                f"So many images ({self.count} of each row) can miss a difference from "
                f"{'the copy' if self.candidates else self.target} that is smaller than: "
                f"{', '.join(sizes)}. Half of that needs four times as many."
            )
        return InWords(mark, headline, tuple(lines), tuple(cautions))

    def _judge(self) -> tuple[Mark, str]:
        if not self.scores:
            return "⚠", "The images are drawn, and no metric judged them: look at the page."
        sides = {row: self.compare(row, COPY) for row in self.candidates}
        best = [row for row, (better, worse) in sides.items() if better and not worse]
        if best:
            return "✔", f"Better than the copied LoRA: {', '.join(best)}."
        if mixed := [row for row, (better, worse) in sides.items() if better and worse]:
            names = ", ".join(mixed)
            return "⚠", f"Better than the copied LoRA in some scores, worse in others: {names}."
        if self.candidates:
            told = "none is better" if any(w for _, w in sides.values()) else "no difference shows"
            return "⚠", f"The copied LoRA is as good as any here: {told}."
        if COPY not in self.rows:
            return "⚠", f"The LoRA cannot be copied to {self.target}: compare the scores."
        better, worse = self.compare(COPY, TARGET)
        if better and not worse:
            return "✔", f"The copied LoRA works on {self.target}."
        costs = ", and costs something" if better else " no better than no LoRA"
        return "⚠", f"The copied LoRA works on {self.target}{costs}."

    def _tell(self, row: str, other: str) -> str:
        """What the intervals show of a row, in a sentence."""
        name = "the copy" if other == COPY else f"{self.target} alone"
        better, worse = map(", ".join, self.compare(row, other))
        if better and worse:
            return f"{row} is better than {name} in {better}, and worse in {worse}."
        if better or worse:
            return f"{row} is {'better' if better else 'worse'} than {name}: {better or worse}."
        return f"{row} and {name}: no difference shows (images of each: {self.count})."

    def tables(self) -> list[Table]:
        """The means, and the differences to the copy."""
        means = []
        for row in self.rows[1:]:
            found = [self.estimate(score, row) for score in self.scores]
            means.append(Row((row, self.find_norm(row), *(x.mean if x else None for x in found))))
        columns = [Column("row"), Column("norm", ".2f"), *(Column(s, ".3f") for s in self.scores)]
        note = f"Likeness is that to {self.reference}. " if self.reference else ""
        note += (
            "A LoRA of a small norm leaves the target's quality alone: read scores of quality "
            "beside the norm."
        )
        if self.lower:
            note += f" Less is better in {', '.join(sorted(self.lower))}."
        rows = []
        for row in (*self.candidates, *(r for r in (TRAINED_THERE, TARGET) if r in self.rows)):
            for score in self.scores:
                if apart := self.estimate(score, row, COPY):
                    share = self.find_share(score, row)
                    rows.append(Row((row, score, *asdict(apart).values(), share)))
        signed = [Column(name, "+.4f") for name in ("− copy", "low", "high")]
        others = [Column("row"), Column("metric"), *signed, Column("smallest", ".4f")]
        told = "95 % intervals over LoRAs, prompts and seeds, each comparison by itself."
        first = make_table(f"Mean scores (images of each row: {self.count})", columns, means, note)
        second = make_table(
            "Differences to the copy", [*others, Column("share", ".2f")], rows, told
        )
        return [first, second] if rows else [first]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        words, rows = self.in_words(), {}
        for row in self.rows:
            means = {score: self.estimate(score, row) for score in self.scores}
            differences = {score: self.estimate(score, row, COPY) for score in self.scores}
            rows[row] = {
                "norm": self.find_norm(row),
                "scores": {s: asdict(x) for s, x in means.items() if x},
                "minus_copy": {s: asdict(x) for s, x in differences.items() if x and row != COPY},
                "share": {s: self.find_share(s, row) for s, x in means.items() if x},
            }
        return {
            "prolora": __version__,
            "verdict": asdict(words),
            "source": self.source,
            "target": self.target,
            "loras": [subject.name for subject in self.subjects],
            "settings": self.settings,
            "reference": self.reference,
            "skipped": self.skipped,
            "lower_is_better": sorted(self.lower),
            "rows": rows,
            "images": [self._describe_image(cell, file) for cell, file in self.images.items()],
        }

    def _describe_image(self, cell: Cell, file: str) -> dict[str, Any]:
        lora = [subject.name for subject in self.subjects].index(cell.lora)
        prompt = self.subjects[lora].prompts.index(cell.prompt)
        place = lora, prompt, self.seeds.index(cell.seed)
        known = {score: rows[cell.row] for score, rows in self.scores.items() if cell.row in rows}
        scores = {score: float(values[place]) for score, values in known.items()}
        return asdict(cell) | {"file": file, "scores": scores}

    def to_html(self) -> str:
        """One page: the verdict, the images and the tables; it loads nothing."""
        words, loras = self.in_words(), ", ".join(subject.name for subject in self.subjects)
        facts = {"LoRA": loras, "source": self.source, "target": self.target}
        facts |= {name: str(x) for name, x in self.settings.items() if x is not None}
        page = Page(
            title=f"{loras} on {self.target}",
            eyebrow="LoRA evaluation",
            headline=f"{words.mark} {words.headline}",
            lines=(*words.lines, *words.cautions),
            grid=self.grid,
            sections=[Section("Scores", [part for t in self.tables() for part in (t, t.note)])],
            facts=facts,
        )
        return render_page(page)
