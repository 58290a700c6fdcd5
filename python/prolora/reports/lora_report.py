"""A report of a LoRA that was written: what became of its modules and tensors."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters.formats.moves import MERGE, Move, describe_moves
from ..version import __version__
from .module_report import (
    LEFT_OUT,
    STATUSES,
    Measures,
    ModuleReport,
    measure_coverage,
    split_modules,
)
from .module_tables import (
    MEASURED,
    Measured,
    tabulate_modules,
    tabulate_moved,
    tabulate_reasons,
    weighted_mean,
)
from .report import PictureGrid, Report, Sentence, read_again
from .table import Column, Row, Table, make_table

ENOUGH = 0.95
"""A LoRA that keeps this share of the energy does what it was made of."""


@dataclass(frozen=True, repr=False, kw_only=True)
class LoraReport(Report):
    """What became of a LoRA, module by module.

    Attributes:
        method: how it was made, as headers call it.
        source: name of the base that it came from, or of what it was made of.
        target: name of the base that it is for; "" where none was given.
        modules: one row for every module of the LoRA, and one more for each further target.
        vectors: number of trained biases and tensors of normalisation layers carried over.
        left_out: tensor of the file that is no update and is not moved -> why.
        unread: modules whose updates could not be read and stay behind; their rows say why.
        kept_energy: module -> share of its ‖ΔW_s‖² that was read, for updates of too high a rank
            for a LoRA; all others were read exactly.
        quantised: name of a base -> how its weights are quantised, and how many; none for a base
            that is stored as numbers.
        blocks: the factors by block that were asked for; "" without.
        dry_run: True where nothing was written. Rows then carry no measures.
        before: the earlier verdict, where the result was there already and is kept.
        seconds: wall time by stage.
        provenance: what the header of the result says of its making, without the "prolora." of its
            keys: digests of the LoRA and of the bases, version, recipe; empty in a dry run.
    """

    method: str
    source: str
    target: str = ""
    modules: tuple[ModuleReport, ...] = ()
    vectors: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    kept_energy: dict[str, float] = field(default_factory=dict)
    quantised: dict[str, str] = field(default_factory=dict)
    blocks: str = ""
    dry_run: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Returns one line: the method, the two bases and the counts."""
        counts = ", ".join(f"{len(self.rows(status))} {status}" for status in STATUSES)
        state = "kept, " if self.before else "dry run, " if self.dry_run else ""
        return f"{type(self).__name__}({state}{self.method!r}, {self.title}: {counts})"

    @property
    def title(self) -> str:
        """The two bases, or what a LoRA without a second one was made of."""
        return f"{self.source} → {self.target}" if self.target else self.source

    def rows(self, status: str) -> list[ModuleReport]:
        """Returns the rows with that status."""
        return [row for row in self.modules if row.status == status]

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
        mapped = self.rows("mapped")
        measures = [(row.energy, row.measures) for row in mapped if row.measures]
        total = sum({row.source: row.energy for row in self.modules}.values())
        mapped_energy = sum({row.source: row.energy for row in mapped}.values())

        def average_measure(value: Callable[[Measures], float]) -> float | None:
            return weighted_mean((energy, value(numbers)) for energy, numbers in measures)

        def average_row(value: Callable[[ModuleReport], float]) -> float | None:
            return None if self.dry_run else weighted_mean((r.energy, value(r)) for r in mapped)

        squared_distance = average_row(lambda row: row.copy_distance**2)
        return {status: len(self.rows(status)) for status in STATUSES} | {
            "coverage": measure_coverage(self.modules),
            "energy_mapped": mapped_energy / total if total > 0 else None,
            "energy_surviving": average_row(lambda row: row.norm_ratio**2),
            "energy_mixed": average_measure(lambda m: m.mixed_energy),
            "energy_cut": average_row(lambda row: row.rank_cut_energy),
            "phi_left": average_measure(lambda m: m.phi_left),
            "phi_right": average_measure(lambda m: m.phi_right),
            "copy_distance": None if squared_distance is None else math.sqrt(squared_distance),
            "flagged": sum(not numbers.ok for _, numbers in measures),
        }

    def tables(self) -> list[Table]:
        """Tabulates what moved, and what did not."""
        mapped = self.rows("mapped")
        title = f"{self.title}, method {self.method}"
        moved = [tabulate_moved(title, mapped, self._measured())] if mapped else []
        behind = tabulate_reasons(self.modules)
        return [*moved, behind] if behind else moved

    def page_tables(self) -> list[Table]:
        """Adds the tensors that stay behind, and every module."""
        tables = self.tables()
        if self.left_out:
            columns, rows = (Column("tensor"), Column("why")), map(Row, self.left_out.items())
            tables.append(make_table(self._count_left_out(), columns, rows))
        if self.modules:
            tables.append(tabulate_modules(self.modules, self._measured()))
        return tables

    def _measured(self) -> Sequence[Measured]:
        """Lists the numbers that the tables of modules have."""
        return () if self.dry_run else MEASURED

    def cautions(self) -> list[str]:
        """Lists what was lost, or needs a look."""
        cautions = []
        if self.unread:
            first = self.unread[0]
            reason = next(row.reason for row in self.modules if row.source == first)
            cautions.append(
                f"Careful: {count_things(self.unread, 'update')} of the file could not be read and "
                f"{'stays' if len(self.unread) == 1 else 'stay'} behind; {first}: {reason}."
            )
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            cautions.append(f"{self._count_left_out()}; {name}: {reason}.")
        if self.blocks:
            gone = sum(row.reason == LEFT_OUT for row in self.modules)
            what = f"; {gone} modules have the factor 0 and are left out as asked" if gone else ""
            cautions.append(f"Factors by block, as asked: {self.blocks}{what}.")
        return cautions

    def sentences(self) -> list[str]:
        """Reports how many modules and tensors were placed, and how the file was read."""
        totals, (names, placed) = self.totals, split_modules(self.modules)
        sentences = [
            f"{len(placed)} of {len(names)} modules {self._describe_done()}"
            f"; {totals['skipped']} skipped, {totals['refused']} refused."
        ]
        sentences += [
            f"{name} is quantised: {what}; what is measured of it includes the rounding."
            for name, what in self.quantised.items()
        ]
        sentences += self._describe_vectors()
        if self.kept_energy:
            sentences.append(
                f"{len(self.kept_energy)} updates had too high a rank for a LoRA and were cut; the "
                f"one cut most keeps {min(self.kept_energy.values()):.1%} of its energy."
            )
        return sentences

    def _describe_done(self) -> str:
        """Reports what was done with modules, and between which bases."""
        raise NotImplementedError

    def _describe_vectors(self) -> list[str]:
        what = "trained biases and normalisation tensors are carried over"
        return [f"{self.vectors} {what}."] if self.vectors else []

    def _count_left_out(self) -> str:
        stay = "stays" if len(self.left_out) == 1 else "stay"
        return f"{count_things(self.left_out, 'tensor')} of the file {stay} behind"

    def numbers(self) -> dict[str, Any]:
        """Returns what the report holds, by name."""
        rows = [row.to_dict(is_planned=self.dry_run) for row in self.modules]
        return super().numbers() | {"modules": rows, "totals": self.totals}

    def facts(self) -> dict[str, str]:
        """Returns how the result was made, by name: bases, digests, options."""
        origin, seconds = self.provenance, sum(self.seconds.values())
        facts = {
            "source base": self.source,
            "digest of the source": origin.get("source_hash", ""),
            "quantised": "; ".join(f"{n}: {what}" for n, what in self.quantised.items()),
            "target base": self.target,
            "digest of the target": origin.get("target_hash", ""),
            "digest of the LoRA": origin.get("lora_hash", ""),
            **self._list_choices(),
            "factors by block": self.blocks,
            "recipe": origin.get("recipe", ""),
            "versions": f"prolora {origin.get('version', __version__)}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
            "time": f"{seconds:.1f} s" if seconds else "",
        }
        return {name: text for name, text in facts.items() if text}

    def _list_choices(self) -> dict[str, str]:
        return {"method": self.method}


@dataclass(frozen=True, repr=False, kw_only=True)
class MovedReport(LoraReport):
    """What became of a LoRA on its way to another base.

    Attributes:
        strength: the factor on every update.
        asked: the method that the caller asked for; None in a dry run.
        why: why it was moved in this way, in a sentence of whoever chose it; "" without one.
        warnings: of the bases; said first.
        moves: what prolora did to the LoRA before: from which base to which, oldest first.
        grid: images for the page; None where none were asked for.
    """

    strength: float = 1.0
    asked: str | None = None
    why: str = ""
    warnings: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()
    grid: PictureGrid | None = None

    @property
    def pictures(self) -> PictureGrid | None:
        """What was drawn; None without images."""
        return self.grid

    def in_words(self) -> Sentence:
        """Returns the verdict for people: warnings, expectation, what was done."""
        if self.before:
            return read_again(self.before)
        verdict = self._judge()
        return verdict.after(self.warnings) if self.warnings else verdict

    def _judge(self) -> Sentence:
        """Returns the verdict without warnings of the bases."""
        raise NotImplementedError

    def cautions(self) -> list[str]:
        """Lists what was lost, or needs a look."""
        # A merge on one base names that as its source, too.
        moves = [move for move in self.moves if move.method != MERGE or move.source != move.target]
        lost = "what was lost there adds to what is lost now"
        before = [f"The LoRA was moved before, {describe_moves(moves)}: {lost}."] if moves else []
        return [*super().cautions(), *before]

    def sentences(self) -> list[str]:
        """Reports what moved, and of a kept result where its numbers are."""
        again = "Its numbers are in the report of the run that made it; `overwrite` makes it anew."
        return [*super().sentences(), *([again] if self.before else [])]

    def _describe_done(self) -> str:
        past, future = ("copied", "copy") if self.method == "copy" else ("moved", "move")
        done = f"would {future}" if self.dry_run and not self.before else past
        return f"{done} from {self.source} to {self.target}"

    def numbers(self) -> dict[str, Any]:
        """Returns what the report holds, by name; images are for people."""
        return {name: value for name, value in super().numbers().items() if name != "grid"}

    def _list_choices(self) -> dict[str, str]:
        how = f"{self.method}, asked for: {self.asked}" if self.asked else self.method
        return {"method": how, "strength": f"{self.strength:.4g}"}


def count_things(things: Collection[str], what: str) -> str:
    """Writes a number of things: 1 update, 2 updates."""
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"
