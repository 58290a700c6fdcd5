"""What a merge did to its LoRAs, and where they conflict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..adapters.formats.moves import UNSTATED, StatedBase, explain_other_bases
from ..core.grouping import group_by
from ..core.lowrank import LowRank
from ..core.merging import measure_overlap
from ..reports.table import Column, Row, Table, make_table
from .made_report import MadeReport

LOSING, SAME = 0.5, 1.05
"""Shares of a LoRA in the result: below the first it mostly loses; above the second others
do a part of it, too."""
CANCELS, DOUBLES = 0.6, 1.5
"""Where ‖ΣΔW‖² is below or above these parts of Σ‖ΔW‖², LoRAs cancel or do one thing twice."""


@dataclass(frozen=True)
class MergedPart:
    """One LoRA of a merge."""

    name: str  # of the LoRA, without folders
    strength: float = 1.0  # the factor on it
    blocks: str = ""  # the factors by block on it; "" without
    trigger: str = ""  # its trigger phrase; "" without one
    stated_base: StatedBase = UNSTATED  # the base that its header names
    digest: str = ""  # "sha256:…" of its file; "" of a LoRA in memory
    modules: int = 0  # how many are read
    unread: int = 0  # how many more could not be read
    energy: float = 0.0  # Σ‖ΔW‖² of all of it, strength included
    # Σ⟨ΔW_merged, ΔW⟩/Σ‖ΔW‖²: 1 if all of it is in the result; more where another does the same,
    # less where another works against it or a cut left it out.
    kept: float = 0.0


@dataclass(frozen=True)
class ModuleOverlap:
    """Two LoRAs in a module that both have."""

    module: str
    first: int  # index of a LoRA
    second: int  # index of another one
    cosine: float  # ⟨ΔW_i, ΔW_j⟩/(‖ΔW_i‖‖ΔW_j‖): −1 if they cancel, 1 if they do the same
    left: float  # Φ, 0 … 1, of what they write
    right: float  # Φ of what they read
    energy: float  # ‖ΔW_i‖·‖ΔW_j‖, the weight of this row in means
    sum_energy: float  # ‖ΔW_i + ΔW_j‖²/(‖ΔW_i‖² + ‖ΔW_j‖²)


@dataclass(frozen=True, repr=False, kw_only=True)
class MergeReport(MadeReport):
    """What became of the LoRAs of a merge."""

    parts: tuple[MergedPart, ...]  # a row for each LoRA
    # A row for each module and each two LoRAs that have it
    overlaps: tuple[ModuleOverlap, ...] = ()
    balanced: bool = False  # whether what several do was to count once

    def lines(self) -> list[str]:
        """Reports for each LoRA how much of it is in the result."""
        lines = []
        for part in self.parts:
            what = "what was read of it" if part.unread else "it"
            amount = f"{min(part.kept, 1):.0%} of {what} is in the result"
            if part.kept > SAME:
                amount = f"all of {what} is in the result, and another LoRA does some of the same"
            lines.append(f"{part.name} at strength {part.strength:.3g}: {amount}.")
        return lines

    def cautions(self) -> list[str]:
        """Reports which LoRAs lose, cancel, or do the same thing."""
        cautions = super().cautions()
        cautions += [
            f"Careful: {part.name} mostly loses; give it a higher strength, or the result a higher "
            "rank."
            for part in self.parts
            if part.kept < LOSING
        ]
        for first, second, rows in self._pairs():
            names = f"{self.parts[first].name} and {self.parts[second].name}"
            against = [row.module for row in rows if row.sum_energy < CANCELS]
            alike = [row.module for row in rows if row.sum_energy > DOUBLES]
            if against:
                cautions.append(f"{names} cancel in {_count(against, rows)}.")
            if alike and not self.balanced:
                cautions.append(
                    f"{names} do the same in {_count(alike, rows)}: together they are too strong "
                    "there; `method='balanced'` does it once."
                )
        other = explain_other_bases({part.name: part.stated_base for part in self.parts})
        return [*cautions, other] if other else cautions

    def tables(self) -> list[Table]:
        """Tabulates how each two LoRAs overlap, too."""
        columns = [Column("LoRAs"), Column("modules", "d"), Column("cosine of updates", ".2f")]
        columns += [Column("write alike", ".2f"), Column("read alike", ".2f")]
        columns += [Column("cancel", "d"), Column("double", "d")]
        pairs = [
            Row((f"{self.parts[first].name}, {self.parts[second].name}", *_average(rows)))
            for first, second, rows in self._pairs()
        ]
        overlaps = [make_table("How the LoRAs overlap", columns, pairs)] if pairs else []
        return [*overlaps, *super().tables()]

    def _pairs(self) -> Iterable[tuple[int, int, list[ModuleOverlap]]]:
        pairs = group_by(self.overlaps, lambda row: (row.first, row.second))
        return [(*pair, rows) for pair, rows in sorted(pairs.items())]


def _count(some: Sequence[str], rows: Sequence[ModuleOverlap]) -> str:
    return f"{len(some)} of {len(rows)} modules, the first of them {some[0]}"


def _average(rows: Sequence[ModuleOverlap]) -> list[float | None]:
    """Averages rows to cells: cosines and overlaps weighted by energy."""
    total = sum(row.energy for row in rows)
    means = [
        sum(row.energy * getattr(row, name) for row in rows) / total if total else None
        for name in ("cosine", "left", "right")
    ]
    return [
        len(rows),
        *means,
        sum(row.sum_energy < CANCELS for row in rows),
        sum(row.sum_energy > DOUBLES for row in rows),
    ]


def relate_updates(module: str, parts: Mapping[int, LowRank]) -> Iterator[ModuleOverlap]:
    """Relates the LoRAs that have a module, two at a time.

    `parts` is index of a LoRA -> its update, strength included.
    """
    if len(parts) < 2:
        return
    overlap, owners = measure_overlap([*parts.values()]), list(parts)
    products, left, right = (x.tolist() for x in (overlap.products, overlap.left, overlap.right))
    for i, j in itertools.combinations(range(len(owners)), 2):
        own, energy = products[i][i] + products[j][j], math.sqrt(products[i][i] * products[j][j])
        yield ModuleOverlap(
            module,
            owners[i],
            owners[j],
            cosine=products[i][j] / energy if energy else 0.0,
            left=left[i][j],
            right=right[i][j],
            energy=energy,
            sum_energy=1 + 2 * products[i][j] / own if own else 1.0,
        )
