"""The report of a LoRA that was moved by weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..comparison.expectation import CLASSES, classify
from ..comparison.module_map import BlockDecision, describe_renumbered
from ..core.methods import METHODS
from ..core.verdict import STRANGE_COSINE, PairVerdict, describe_strangers
from ..reports.lora_report import ENOUGH, MovedReport
from ..reports.module_report import LEFT_OUT, split_modules
from ..reports.report import Mark, Sentence
from ..reports.table import Cell, Column, Row, Table, make_table

MOST = 0.7
"""A LoRA that does this share on the target does most of what it did."""

AMOUNTS = (
    (0.995, "All"),
    (MOST, "Most"),
    (0.58, "About two thirds"),
    (0.42, "About half"),
    (0.25, "About a third"),
    (0.1, "A small part"),
    (0.0, "Very little"),
)
"""From which share on a part is called how."""

A_VECTOR = "a trained bias or normalisation layer"
"""How reasons begin for which such a tensor stays behind."""

LITTLE = 0.4
"""A LoRA that keeps less than this share on the target promises little."""


@dataclass(frozen=True, repr=False, kw_only=True)
class TransferReport(MovedReport):
    """What a transfer kept and lost.

    Attributes:
        rank_rule: columns (int) or share of energy (float) of the bases.
        threshold: the Φ that both sides of a pair must reach.
        match: how modules were paired.
        decisions: the source of each block of the target and the runner-up, where blocks were
            matched by similarity.
        dropped_blocks: the source's blocks that feed none, where blocks were matched by
            similarity.
        renumbered: the target's block -> the source's block whose weights it holds, where equal
            names say otherwise.
        as_stored: whether the file holds the stored tensors and scales of the LoRA as they are.
        base_dependent: how many of these are relative to weights of the base (DoRA, OFT, GLoRA).
        few_steps: whether the target draws in few steps and the source does not; None where
            nothing shows it.
        few_by_name: whether then the target's name has a word of few-step models.
        verdict: what the weights of the two bases promise; None in a dry run.
    """

    eyebrow: ClassVar[str] = "LoRA transfer report"

    rank_rule: int | float
    threshold: float
    match: str
    decisions: tuple[BlockDecision, ...] = ()
    dropped_blocks: tuple[str, ...] = ()
    renumbered: dict[str, str] = field(default_factory=dict)
    as_stored: bool = False
    base_dependent: int = 0
    few_steps: bool | None = None
    few_by_name: bool = False
    verdict: PairVerdict | None = None

    @property
    def works_as_it_is(self) -> bool:
        """Whether the LoRA's own file does on the target what the result does."""
        plain = self.method == "copy" and self.strength == 1 and not self.blocks
        missing = self.left_out or self.unread or not (self.modules or self.vectors)
        if not plain or missing or (self.dry_run and self.verdict is None):
            return False
        if self.verdict is not None and not self.verdict.related:
            return False
        return all(
            row.status == "mapped" and row.source == row.target and row.rank_in == row.rank_out
            for row in self.modules
        )

    def _judge(self) -> Sentence:
        verdict = self._describe_without_updates() or self._describe_move()
        losses = self._list_losses() if verdict.mark == "✔" else []
        cautions = tuple(line for line in self.cautions() if line not in losses)
        verdict = replace(verdict, cautions=cautions)
        return verdict.after(losses) if losses else verdict

    def _describe_without_updates(self) -> Sentence | None:
        """Returns the verdict on a LoRA whose matrices certainly do nothing; else None."""
        if any(row.energy != 0 for row in self.modules):
            return None
        if self.rows("mapped") and not (self.unread or self.vectors or self.left_out):
            return Sentence("⚠", "This LoRA changes nothing: it is zero.")
        if self.dry_run:
            return None
        sentence = self._describe_vectors_alone()
        if self.unread or not sentence:
            return Sentence("⚠", "All that could be read of this LoRA's updates is zero.")
        bases = self.source, self.target
        expectation = judge(self.verdict, None, bases) if self.vectors else None
        return Sentence(expectation.mark if expectation else "⚠", sentence)

    def _describe_move(self) -> Sentence:
        """Reports what to expect, how much has a place, and what was done."""
        bases = tuple(name.removesuffix(".safetensors") for name in (self.source, self.target))
        target, placed, share = bases[1], self.totals["energy_mapped"], None
        if placed is None:
            names, there = split_modules(self.modules)
            there |= {row.source for row in self.modules if row.reason == LEFT_OUT}
            placed = len(there) / len(names) if names else None
            place = (
                f"{len(there)} of the LoRA's {len(names)} parts ({placed or 0:.0%}) have a place "
                f"on {target}; how much those do cannot be known beforehand."
            )
            place = place if names else self._describe_vectors_alone()
        else:
            mapped, share = placed, self.totals["energy_surviving"]
            everything = {row.source: row.energy for row in self.modules}
            asked = {row.source for row in self.modules if row.reason == LEFT_OUT}
            # These have a place, and were left out there as asked.
            placed += sum(everything[name] for name in asked) / sum(everything.values())
            if share is not None and placed > 0:
                share *= mapped / placed
                share /= self.strength**2 if self.method == "copy" else 1.0
            place = describe_coverage(placed, None if self.dry_run else share, target)
        done = "" if self.dry_run else self._describe_method()
        if self.unread:
            names, there = split_modules(self.modules)
            place = (
                f"{len(there)} of the LoRA's {len(names)} parts have a place on {target}; "
                f"{len(self.unread)} could not be read."
            )
        if self.dry_run and (self.verdict is None or placed is None):
            fits = bool(self.vectors) if placed is None else placed >= LITTLE
            unknown = "The weights of the two models were not compared: whether it will work is "
            parts = place, "" if self.why else f"{unknown}not known.", self.why
            mark: Mark = "✔" if fits else "⚠"
            return Sentence(mark, "A dry run: nothing was written.", tuple(filter(None, parts)))
        promised = self.dry_run or (self.method == "copy" and self.strength == 1)
        few_steps = False if self.few_by_name else self.few_steps  # its name is told below
        found = judge(self.verdict, placed, bases, few_steps, promised)
        if self.method not in (*METHODS, "auto"):
            headline = (
                f"Your method {self.method} moved the LoRA; prolora never tried what it does."
            )
            return Sentence("⚠", headline, (place,))
        if self.works_as_it_is:
            changes = "" if found.mark == "✔" else ": nothing in it had to change"
            place = f"The file works on {target} as it is{changes}."
        named = f"By its name, {target} draws in few steps: if so, set `target_steps=4`."
        lines = (*found.lines, place, done, named if self.few_by_name else "", self.why)
        return Sentence(found.mark, found.headline, tuple(filter(None, lines)))

    def _list_losses(self) -> list[str]:
        """Lists what the headline must not promise: parts that are missing in the result."""
        lost, losses = self.totals["energy_cut"] or 0.0, []
        if self.unread:
            names, _ = split_modules(self.modules)
            losses.append(f"{len(self.unread)} of the LoRA's {len(names)} parts could not be read.")
        return [*losses, self._describe_cut(lost)] if lost > 1 - ENOUGH else losses

    @staticmethod
    def _describe_cut(lost: float) -> str:
        return (
            f"Cutting the rank took {lost:.0%} of what was moved; a higher `out_rank` keeps more "
            "of it."
        )

    def _describe_vectors_alone(self) -> str:
        """Reports how much of a LoRA without matrices goes over; "" without vectors."""
        behind = sum(reason.startswith(A_VECTOR) for reason in self.left_out.values())
        what = "This LoRA is trained biases and normalisation layers alone"
        total = self.vectors + behind
        return f"{what}; {self.vectors} of {total} go over." if total else ""

    def _describe_method(self) -> str:
        """Describes what was done in a sentence; "" of a plain copy."""
        if self.method == "copy":
            plain = self.strength == 1
            return "" if plain else f"prolora copied the LoRA at strength {self.strength:.3g}."
        return (
            f"prolora moved the LoRA by the method {self.method}, as asked; on nearly all test "
            "models a copy did better."
        )

    def cautions(self) -> list[str]:
        """Lists what was lost, or needs a look."""
        cautions = super().cautions()
        if self.base_dependent:
            cautions.append(
                f"{self.base_dependent} updates are relative to the weights of {self.source} "
                "(DoRA, OFT or GLoRA). They are kept as they are stored, and act on those of "
                f"{self.target} now."
            )
        if (lost := self.totals["energy_cut"] or 0.0) > 1 - ENOUGH:
            cautions.append(self._describe_cut(lost))
        # In a pair of related bases they are the mark of a wrong pairing: blocks were renumbered.
        strangers = [
            (row.source, str(row.target))
            for row in self.rows("mapped")
            if row.cosine is not None and row.cosine < STRANGE_COSINE
        ]
        if strangers and self.verdict is not None and self.verdict.related:
            cautions.append(describe_strangers(strangers))
        return cautions

    def sentences(self) -> list[str]:
        """Reports what was done in numbers, with the copy baseline."""
        sentences, totals = super().sentences(), self.totals
        if self.dry_run or totals["energy_surviving"] is None:
            return sentences
        sentences += [self.verdict.sentence()] if self.verdict else []
        whole = "energy that was read" if self.unread else "LoRA's energy"
        sentences += describe_renumbered(self.renumbered)
        if self.method == "copy":
            scale = "" if self.strength == 1 else f", times {self.strength:.3g}"
            share = f"{totals['energy_mapped']:.0%}"
            sentences.append(f"The copied modules hold {share} of the {whole}{scale}.")
        else:
            sentences.append(
                f"The moved modules hold {totals['energy_mapped']:.0%} of the {whole}; "
                f"'{self.method}' at strength {self.strength:.2g} keeps "
                f"{totals['energy_surviving']:.0%} of that. The result differs from a copy by "
                f"{totals['copy_distance']:.0%} of the update's norm."
            )
        if (totals["energy_mixed"] or 0) > 0.01 and self.method == "prolora":
            sentences.append(
                f"{totals['energy_mixed']:.0%} lay in the mixed blocks, which '{self.method}' "
                "drops; `method='copy'` changes nothing."
            )
        if flagged := totals["flagged"]:
            sentences.append(f"{flagged} modules missed the accuracy tolerance (see 'ok').")
        return sentences

    def _describe_vectors(self) -> list[str]:
        sentences = super()._describe_vectors()
        if sentences and self.strength != 1:
            sentences = [f"{sentences[0].removesuffix('.')} at strength {self.strength:.2g}."]
        if self.as_stored:
            sentences.append("The file holds the LoRA's stored tensors and scales as they are.")
        return sentences

    def tables(self) -> list[Table]:
        """Tabulates where blocks came from, and what moved or did not."""
        blocks = [_tabulate_blocks(self.decisions)] if self.decisions else []
        return [*blocks, *super().tables()]

    def numbers(self) -> dict[str, Any]:
        """Returns what the report holds, by name."""
        decisions = [one.to_dict() for one in self.decisions]
        return super().numbers() | {"decisions": decisions, "works_as_it_is": self.works_as_it_is}

    def _list_choices(self) -> dict[str, str]:
        return super()._list_choices() | {
            "rank of the subspaces": f"{self.rank_rule:g}",
            "threshold on Φ": f"{self.threshold:g}",
            "match": self.match,
            "blocks not used": ", ".join(self.dropped_blocks),
        }


def judge(
    verdict: PairVerdict | None,
    placed: float | None,
    bases: tuple[str, ...],
    few_steps: bool | None = None,
    promised: bool = True,
) -> Sentence:
    """Describes what to expect of a LoRA between two models, and which strengths.

    Args:
        verdict: on the two models; None if their weights were not compared.
        placed: the share of the LoRA with a counterpart on the target; None without a LoRA.
        bases: the names of source and target.
        few_steps: whether the target draws in few steps; None where its files do not tell.
        promised: whether the LoRA is copied at strength 1, the measured case.
    """
    source, target = bases
    if verdict is None:
        return Sentence("⚠", "Done as asked; the two models were not compared.")
    cut = placed is not None and placed < AMOUNTS[0][0]
    expectation = CLASSES[classify(verdict, cut, bool(few_steps))]
    mark, headline = expectation.mark, expectation.headline.format(source=source, target=target)
    if placed is not None and placed < LITTLE and verdict.related:
        headline = f"Expect little: most of this LoRA belongs to parts that {target} lacks."
    if not promised:
        return Sentence(mark, headline)
    advice = expectation.advice.format(source=source, target=target)
    if few_steps is None and expectation.name in ("alike", "changed"):
        advice += " If it draws in few steps, which prolora cannot see, set `target_steps=4`."
    low, high = expectation.range or (0.0, 0.0)
    outcome = expectation.outcome.format(low=low, high=high)
    return Sentence(mark, headline, tuple(filter(None, (advice, outcome))))


def name_amount(share: float) -> str:
    """Writes a share in words: most, about half, a small part."""
    return next((word for least, word in AMOUNTS if share >= least), AMOUNTS[-1][1])


def describe_coverage(placed: float, share: float | None, target: str) -> str:
    """Reports how much of a LoRA fits the target, and how much was kept."""
    text = f"{name_amount(placed)} of the LoRA ({placed:.0%}) has a place on {target}"
    if share is None:
        return f"{text}."
    rest = "all" if share >= AMOUNTS[0][0] else f"{share:.0%}"
    return f"{text}, and {rest} of that was kept."


def _tabulate_blocks(decisions: Sequence[BlockDecision]) -> Table:
    """Tabulates the source of each block, and the runner-up."""
    columns = [Column("block"), Column("from"), Column("runner-up"), Column("score", ".2f")]
    columns += [Column("2nd", ".2f"), Column("margin", ".2f")]
    rows = []
    for one in decisions:
        names = one.target, one.source, one.runner_up
        short = [(name or "none").replace(".transformer_blocks.", ".") for name in names]
        cells: list[Cell] = [*short, one.score, one.runner_up_score, one.margin]
        rows.append(Row(tuple(cells), "" if one.source else "warn"))
    return make_table("The source of each block", columns, rows)
