"""What a transfer kept and lost, by module and in total."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

import torch

from ..adapters.formats.moves import Move
from ..comparison.expectation import Mark
from ..comparison.module_map import BlockDecision, describe_renumbered
from ..core.means import weighted_mean
from ..core.verdict import STRANGE_COSINE, Verdict, describe_strangers
from ..files.jsontext import replace_nonfinite
from ..files.store import put_text
from ..probe.report import ProbeReport
from ..version import __version__
from . import tables
from .block_weights import LEFT_OUT
from .in_words import (
    CONVERT,
    EXTRACT,
    FIT_NO_BETTER,
    LITTLE,
    MERGE,
    NOT_COMPARED,
    READ_ZERO,
    ZERO,
    InWords,
    judge,
    read_again,
    say_first,
    tell_fit,
    tell_made,
    tell_method,
    tell_parts,
    tell_place,
    tell_vectors,
)
from .merge_report import MergeReport
from .module_report import STATUSES, ModuleReport, measure_coverage, measure_totals, split_modules
from .moved_before import tell_moved_before
from .options import FIT
from .output_paths import is_page_path
from .page.document import (
    MODULES,
    Fold,
    Page,
    Picture,
    PictureGrid,
    Section,
    render_page,
    render_summary,
)
from .report_sentences import (
    share_left_out,
    tell_energy,
    tell_factors,
    tell_left_behind,
    tell_limits,
    tell_relative,
    tell_tensors_left,
)
from .table import Table

_MADE = {EXTRACT: "extracted", CONVERT: "converted", MERGE: "merged"}


@dataclass(frozen=True, repr=False)
class Report:
    """What a transfer kept and lost; `print` writes its sentences.

    Attributes:
        method: the method's name.
        rank_rule: columns (int) or share of energy (float) of the bases.
        threshold: the Φ that both sides of a pair must reach.
        match: how modules were paired.
        source: the source base's name.
        target: the target base's name.
        modules: one row for every module of the LoRA, and one more for each further target.
        decisions: the source of each block of the target and the runner-up, where blocks were
            matched by similarity.
        dropped_blocks: the source's blocks that feed none, where blocks were matched by
            similarity.
        renumbered: the target's block -> the source's block whose weights it holds, where equal
            names say otherwise.
        vectors: number of trained biases and tensors of normalisation layers carried over.
        left_out: tensor of the file that is no update and is not moved -> why.
        unread: modules whose updates could not be read and stay behind; their rows say why.
        kept_energy: module -> share of its ‖ΔW_s‖² that was read, for updates of too high a rank
            for a LoRA; all others were read exactly.
        as_stored: whether the file holds the stored tensors and scales of the LoRA as they are.
        base_dependent: how many of these are relative to weights of the base (DoRA, OFT, GLoRA).
        doubts: of the bases; said first.
        before: the earlier verdict, where its result was kept.
        dry_run: True where nothing was moved. Rows then carry no measures.
        asked: the method that the caller asked for; None in a dry run.
        few_steps: whether the target draws in few steps and the source does not; None where
            nothing tells.
        strength: the factor on every update.
        blocks: the factors by block that were asked for; "" without.
        file_limit: bytes of the file that the updates were cut for; None where they were not.
        verdict: what the weights of the two bases promise; None in a dry run, and of a copy between
            bases whose numbers are not read.
        quantised: name of a base -> how its weights are quantised, and how many; none for a base
            that is stored as numbers.
        moves: what prolora did to the LoRA before: from which base to which, oldest first.
        probe: what a fit to running models found; None where none was made.
        grid: images of what a fit did, for the page; None where none
            were asked for.
        work: what a fit would ask of the models, in a sentence; of a dry run alone.
        why: whether and why the models were run, in plain words; of method "best" alone.
        seconds: wall time by stage.
        merge: what became of each LoRA of several, and where they overlap; None without a merge.
        provenance: what the header of the result says of its making, without the "prolora." of its
            keys: digests of the LoRA and of the bases, version, recipe; empty in a dry run.
    """

    method: str
    rank_rule: int | float
    threshold: float
    match: str
    source: str
    target: str
    modules: tuple[ModuleReport, ...] = ()
    decisions: tuple[BlockDecision, ...] = ()
    dropped_blocks: tuple[str, ...] = ()
    renumbered: dict[str, str] = field(default_factory=dict)
    vectors: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    kept_energy: dict[str, float] = field(default_factory=dict)
    as_stored: bool = False
    base_dependent: int = 0
    doubts: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    dry_run: bool = False
    asked: str | None = None
    few_steps: bool | None = None
    strength: float = 1.0
    blocks: str = ""
    file_limit: int | None = None
    verdict: Verdict | None = None
    quantised: dict[str, str] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()
    probe: ProbeReport | None = None
    grid: PictureGrid | None = None
    work: str = ""
    why: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    merge: MergeReport | None = None

    def __repr__(self) -> str:
        """One line: the method, the two bases and the counts."""
        counts = ", ".join(f"{len(self.rows(status))} {status}" for status in STATUSES)
        dry = "dry run, " if self.dry_run else ""
        return f"Report({dry}{self.method!r}, {self.source} -> {self.target}: {counts})"

    def __str__(self) -> str:
        """The verdict in words, then the sentences with the numbers, one a line."""
        return "\n".join([str(self.in_words()), "", *self.sentences()])

    def rows(self, status: str) -> list[ModuleReport]:
        """Returns the rows with that status."""
        return [row for row in self.modules if row.status == status]

    @property
    def was_fitted(self) -> bool:
        """Whether the updates were fitted to running models, and not moved by weights."""
        return self.method == FIT

    @property
    def was_made(self) -> bool:
        """Whether the LoRA was extracted, converted or merged, and not moved between bases."""
        return self.method in _MADE

    @property
    def _between(self) -> str:
        """The two bases, or what a LoRA without a second one was made of."""
        return f"{self.source} → {self.target}" if self.target else self.source

    @property
    def coverage(self) -> float:
        """The share of the LoRA's modules that found a place, 0 … 1."""
        return measure_coverage(self.modules)

    @property
    def totals(self) -> dict[str, Any]:
        """Counts, coverage and energies of the whole LoRA; the same keys for a dry run.

        mapped, skipped, refused: rows. coverage: share of the LoRA's modules that are mapped.
        energy_mapped: share of Σ‖ΔW_s‖² that the mapped modules hold. energy_surviving: Σ‖ΔW_t‖²
        over mapped modules' Σ‖ΔW_s‖². copy_distance: energy-weighted root mean square.
        energy_mixed, phi_left, phi_right: means over projected modules, None where there is none.
        flagged: modules whose bases missed their tolerance. Numbers that need weights are None in a
        dry run.
        """
        return measure_totals(self.modules, self.dry_run)

    def strangers(self) -> list[ModuleReport]:
        """Returns mapped modules with weights that have nothing in common with their partners'.

        In a pair of related bases they are the mark of a wrong pairing: blocks were renumbered.
        """
        return [
            row
            for row in self.rows("mapped")
            if row.cosine is not None and row.cosine < STRANGE_COSINE
        ]

    @property
    def share_on_target(self) -> float | None:
        """The share of the LoRA's energy that is on the target; None where it is not known."""
        total = self.totals["energy_mapped"]
        shares = [(row.energy, tables.share_kept(row)) for row in self.rows("mapped")]
        if self.dry_run or total is None or any(share is None for _, share in shares):
            return None
        mean = weighted_mean(shares)
        return None if mean is None else total * mean

    def reasons(self) -> dict[tuple[str, str], int]:
        """Counts each (status, reason) among modules that are not mapped."""
        return dict(
            Counter((row.status, row.reason) for row in self.modules if row.status != "mapped")
        )

    def tables(self, every_module: bool = False, every_block: bool = False) -> list[Table]:
        """Tabulates where blocks came from, and what moved or did not.

        Args:
            every_module: a row for each module, and not for each part.
            every_block: a row for each block, and not for each stack of them.
        """
        found: list[Table | None] = []
        if self.decisions:
            unused = self.dropped_blocks
            found.append(tables.tabulate_decisions(self.decisions, unused, every_block))
        mapped = self.rows("mapped")
        if mapped and (not self.was_fitted or every_module or self.dry_run):
            title = f"{self._between}, method {self.method}"
            found.append(tables.tabulate_moved(title, mapped, every_module, self.dry_run))
        if self.probe and self.probe.crossed and self.probe.crossed.bands:
            found.append(tables.tabulate_bands(self.probe.crossed.bands))
        if self.merge:
            found.append(self.merge.table(every_module))
        return [table for table in (*found, tables.tabulate_reasons(self.modules)) if table]

    def in_words(self) -> InWords:
        """Returns the verdict for people: doubts, expectation, what was done."""
        if self.before:
            return read_again(self.before)
        return say_first(self.doubts, self._judge()) if self.doubts else self._judge()

    def _judge(self) -> InWords:
        """Returns the verdict without doubts of the bases."""
        placed, kept = self.totals["energy_mapped"], self.totals["energy_surviving"]
        source, target = (name.removesuffix(".safetensors") for name in (self.source, self.target))
        if self.was_made:
            parts = self.merge.lines() if self.merge else ()
            kept, cautions = self.share_on_target, self._cautions()
            if kept is None and not self.dry_run:
                return InWords("⚠", "The result changes nothing: it is zero.", (), cautions)
            return tell_made(self.method, source, target, kept, cautions, parts)
        if (told := self._tell_without_updates(target)) is not None:
            return told
        if self.dry_run or placed is None:
            return self._tell_outline(placed, target)
        if self.was_fitted:
            gate = self.probe.gate if self.probe else None
            shares = [] if gate is None else list(gate.share.values())
            return tell_fit(
                source,
                target,
                min(shares) if shares else None,
                is_refused=gate is not None and gate.decision == "refuse",
                why=self.why,
                cautions=self._cautions(),
            )
        verdict, mapped = self.verdict, placed
        placed += share_left_out(self.modules)  # it has a place, and was left out there as asked
        if kept is not None and placed > 0:
            kept *= mapped / placed
            kept /= self.strength**2 if self.method == "copy" else 1.0
        promised = self.method == "copy" and self.strength == 1
        told = judge(verdict, placed, (source, target), self.few_steps, promised)
        lines = (
            *told.lines,
            tell_place(placed, kept, target),
            FIT_NO_BETTER if self.probe else "",
            tell_method(self.method, self.strength),
            self.why,
        )
        return InWords(told.mark, told.headline, tuple(filter(None, lines)), self._cautions())

    def _tell_without_updates(self, target: str) -> InWords | None:
        """Returns the verdict on a LoRA whose matrices do nothing, if certain.

        None for others.
        """
        if any(row.energy != 0 for row in self.modules):
            return None
        if self.rows("mapped") and not (self.unread or self.vectors or self.left_out):
            return InWords("⚠", ZERO, (), self._cautions())
        if self.dry_run:
            return None
        if self.unread or not (told := tell_vectors(self.vectors, self.left_out)):
            return InWords("⚠", READ_ZERO, (), self._cautions())
        found = judge(self.verdict, None, (self.source, target)) if self.vectors else None
        return InWords(found.mark if found else "⚠", told, (), self._cautions())

    def _tell_outline(self, placed: float | None, target: str) -> InWords:
        """Returns the verdict of a dry run; arguments as for `tell_place`."""
        names, there = split_modules(self.modules)
        there |= {row.source for row in self.modules if row.reason == LEFT_OUT}
        if placed is not None:
            placed += share_left_out(self.modules)
            place = tell_place(placed, None, target)
        elif names:
            placed = len(there) / len(names)
            place = tell_parts(len(there), len(names), target)
        else:
            place = tell_vectors(self.vectors, self.left_out)
        if self.verdict is not None and placed is not None:
            told = judge(self.verdict, placed, (self.source, target), self.few_steps)
            said = tuple(filter(None, (*told.lines, place, self.why)))
            return InWords(told.mark, told.headline, said, self._cautions())
        fits = bool(self.vectors) if placed is None else placed >= LITTLE
        mark: Mark = "✔" if fits else "⚠"
        unknown = "" if self.work or self.why else NOT_COMPARED
        lines = tuple(filter(None, (place, unknown, self.why)))
        return InWords(mark, "A dry run: nothing was written.", lines, self._cautions())

    def _cautions(self) -> tuple[str, ...]:
        """Lists what was lost, or needs a look."""
        merged = self.merge.cautions() if self.merge else []
        cautions = tell_left_behind(self.modules, self.unread, self.left_out)
        cautions += tell_factors(self.blocks, self.modules)
        if self.base_dependent:
            cautions.append(tell_relative(self.base_dependent, self.source, self.target))
        return (*cautions, *tell_moved_before(self.moves), *merged, *self._caution_of_strangers())

    def sentences(self) -> list[str]:
        """Tells what was done in numbers, with the copy baseline."""
        sentences = self._sentences_of_file() + ([self.work] if self.work else [])
        if self.probe is not None:
            sentences += self.probe.sentences()
            if self.was_fitted:
                return sentences
            sentences.append(
                f"So the LoRA moved by weights alone ('{self.method}') is written, at the strength "
                "that suits it best there."
            )
        if self.was_made or self.dry_run or self.totals["energy_surviving"] is None:
            return sentences
        sentences += self._sentences_of_bases()
        sentences += tell_energy(self.totals, self.method, self.strength)
        return sentences + tell_limits(self.modules, self.totals, self.file_limit)

    def _sentences_of_file(self) -> list[str]:
        """Tells how many modules and tensors were placed, and how the file was read."""
        totals, (names, placed) = self.totals, split_modules(self.modules)
        moved = "would move" if self.dry_run else "moved"
        between = f" from {self.source} to {self.target}"
        if self.was_made:
            moved = f"{'would be' if self.dry_run else 'were'} {_MADE[self.method]}"
            between = f" between {self.source} and {self.target}" if self.method == EXTRACT else ""
        sentences = [
            f"{len(placed)} of {len(names)} modules {moved}{between}"
            f"; {totals['skipped']} skipped, {totals['refused']} refused."
        ]
        sentences += [
            f"{name} is quantised: {what}; what is measured of it includes the rounding."
            for name, what in self.quantised.items()
        ]
        sentences += tell_factors(self.blocks, self.modules)
        if self.vectors:
            sentences.append(
                f"{self.vectors} trained biases and normalisation tensors are carried over"
                f"{'' if self.strength == 1 else f' at strength {self.strength:.2g}'}."
            )
        if self.as_stored:
            sentences.append("The file holds the LoRA's stored tensors and scales as they are.")
        if self.kept_energy:
            sentences.append(
                f"{len(self.kept_energy)} updates had too high a rank for a LoRA and were cut; the "
                f"one cut most keeps {min(self.kept_energy.values()):.1%} of its energy."
            )
        return sentences + tell_left_behind(self.modules, self.unread, self.left_out)

    def _sentences_of_bases(self) -> list[str]:
        """Tells the verdict on the two bases, and what followed from it."""
        told = [self.verdict.sentence()] if self.verdict else []
        return [*told, *describe_renumbered(self.renumbered), *self._caution_of_strangers()]

    def _caution_of_strangers(self) -> list[str]:
        """Warns of paired modules with unrelated weights."""
        pairs = [(row.source, str(row.target)) for row in self.strangers()]
        is_odd = bool(pairs) and self.verdict is not None and self.verdict.related
        return [describe_strangers(pairs)] if is_odd else []

    def to_records(self) -> list[dict[str, Any]]:
        """Returns a flat dict for every row, as `pandas.DataFrame` takes them.

        Every record has the same keys: the fields of `ModuleReport` without `measures`, and the
        fields of `Measures`, which are None where nothing was projected. What is not known is None.
        """
        return [row.to_record() for row in self.modules]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON; NaN becomes None."""
        fields = asdict(replace(self, grid=None)) | {
            "modules": [row.to_dict() for row in self.modules],
            "decisions": [decision.to_dict() for decision in self.decisions],
            "totals": self.totals,
            "in_words": str(self.in_words()).split("\n"),
            "summary": self.sentences(),
        }
        del fields["grid"]  # for people
        return replace_nonfinite(fields)  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """Writes `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_html(
        self, facts: Mapping[str, str] | None = None, pictures: Sequence[Picture] = ()
    ) -> str:
        """Renders the report as one HTML page without other files or network.

        It has the verdict, a heat map of what was kept by block and kind of module, a table of
        every module, and how the result was made.

        Args:
            facts: more of how it was made, by name: the LoRA's file, the command.
            pictures: shown below the verdict.
        """
        return render_page(self._to_page(facts or {}, pictures))

    def _repr_html_(self) -> str:
        """Renders for a notebook: sentences, a small map, and a table."""
        return render_summary(self._to_page({}, ()))

    def _to_page(self, facts: Mapping[str, str], pictures: Sequence[Picture]) -> Page:
        """Builds the page of the report."""
        words = self.in_words()
        sections = [Section(table.title, [table]) for table in self.tables(every_block=True)]
        if self.left_out:
            fold = Fold(tell_tensors_left(self.left_out), self.left_out)
            sections.append(Section("What else did not move", [fold]))
        if self.modules:
            every = tables.tabulate_modules(self.modules, self.dry_run)
            sections.append(Section(every.title, [every], MODULES))
        return Page(
            title=self._between,
            eyebrow="LoRA transfer report",
            headline=f"{words.mark} {words.headline}",
            lines=(*words.lines, *words.cautions),
            sentences=self.sentences(),
            pictures=pictures,
            grid=self.grid,
            map=tables.map_modules(self.modules, self.dry_run),
            sections=sections,
            facts=self.facts() | dict(facts),
        )

    def facts(self) -> dict[str, str]:
        """Returns how the result was made: bases, digests, options, by name."""
        origin, seconds = self.provenance, sum(self.seconds.values())
        facts = {
            "source base": self.source,
            "digest of the source": origin.get("source_hash", ""),
            "quantised": "; ".join(f"{n}: {what}" for n, what in self.quantised.items()),
            "target base": self.target,
            "digest of the target": origin.get("target_hash", ""),
            "digest of the LoRA": origin.get("lora_hash", ""),
            "method": f"{self.method}, asked for: {self.asked}" if self.asked else self.method,
            "strength": f"{self.strength:.4g}",
            "factors by block": self.blocks,
            "rank of the subspaces": f"{self.rank_rule:g}",
            "threshold on Φ": f"{self.threshold:g}",
            "match": self.match,
            "dropped blocks": origin.get("dropped", ""),
            "blocks not used": ", ".join(self.dropped_blocks),
            "recipe": origin.get("recipe", ""),
            "versions": f"prolora {origin.get('version', __version__)}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
            "time": f"{seconds:.1f} s" if seconds else "",
        }
        return {name: text for name, text in facts.items() if text}

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the report to a file, whole or not at all; what exists is refused.

        Args:
            path: the file; `to_html` if its name ends in .html or .htm, otherwise `to_dict` as
                JSON.
            overwrite: replace what has that name.

        Raises:
            OutputExists: something has that name.
            OutputError: the path cannot be written.
        """
        text = self.to_html() if is_page_path(path) else json.dumps(self.to_dict(), indent=1) + "\n"
        put_text(path, text, overwrite=overwrite)
