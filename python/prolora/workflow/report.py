"""What a transfer kept and what it lost, module by module and in total."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..comparison.module_map import BlockDecision
from ..comparison.verdict import METHOD_REASONS, STRANGE_COSINE, Verdict, describe_strangers
from ..core.lowrank import LowRank
from ..files.jsontext import replace_nonfinite
from .module_report import Measures

STATUSES = ("mapped", "summed", "skipped", "refused")


@dataclass(frozen=True)
class ModuleReport:
    """One row: a module of the LoRA, and what became of it.

    Attributes:
        source: the module in the LoRA.
        target: where it went; None unless mapped.
        status: "mapped", "skipped", "refused", or "summed" where it was added to another module's
            update and went with it.
        reason: why it was skipped or refused; for a mapped module, how it was moved.
        shape: out × in of the update.
        rank_in: rank in the LoRA; 0 of a module that has no update there and carries only those
            that were added to it.
        rank_out: rank in the output; 0 unless mapped.
        energy: ‖ΔW_s‖², the weight of this row in the totals; of all that was added to it, too.
        strength: factor on the update, on top of what the method does.
        drift: ‖W_t − W_s‖/‖W_s‖ of the module's weights; None where they were not compared.
        cosine: ⟨W_s, W_t⟩/(‖W_s‖‖W_t‖) of them, likewise.
        surviving_energy: ‖ΔW_t‖²/‖ΔW_s‖² before the rank is cut, strength included.
        norm_ratio: ‖ΔW_t‖/‖ΔW_s‖ of what was written.
        copy_distance: ‖ΔW_t − ΔW_s‖/‖ΔW_s‖ before the rank is cut, strength included.
        rank_cut_energy: share of ‖ΔW_t‖² that --out-rank discarded.
        onto: the module whose update this one was added to, and whose row has its energy; or None.
        measures: the numbers of a projection; None where there was none.
    """

    source: str
    target: str | None
    status: str
    reason: str
    shape: tuple[int, ...]
    rank_in: int
    rank_out: int = 0
    energy: float = 0.0
    strength: float = 1.0
    drift: float | None = None
    cosine: float | None = None
    surviving_energy: float = 1.0
    norm_ratio: float = 1.0
    copy_distance: float = 0.0
    rank_cut_energy: float = 0.0
    onto: str | None = None
    measures: Measures | None = None

    def at_strength(self, strength: float) -> ModuleReport:
        """The row of the same update multiplied by `strength`."""
        if strength == 1:
            return self
        # ‖sX − Δ‖² = s²‖X‖² + ‖Δ‖² − 2s⟨X, Δ⟩, in units of ‖Δ‖², with ⟨X, Δ⟩ from s = 1.
        kept = self.surviving_energy
        product = (kept + 1 - self.copy_distance**2) / 2
        distance = strength**2 * kept + 1 - 2 * strength * product
        return replace(
            self,
            strength=strength,
            surviving_energy=strength**2 * kept,
            norm_ratio=strength * self.norm_ratio,
            copy_distance=math.sqrt(max(0.0, distance)),
        )

    def cut(self, whole: LowRank, smaller: LowRank) -> ModuleReport:
        """The row of an update that was cut from `whole` to `smaller`."""
        energy = whole.norm().square().item()
        kept = min(1.0, smaller.norm().square().item() / energy) if energy else 1.0
        return replace(
            self,
            rank_out=smaller.rank,
            rank_cut_energy=1 - kept,
            norm_ratio=self.norm_ratio * kept**0.5,
        )


@dataclass
class Report:
    """The account of one transfer.

    Attributes:
        method: the method's name.
        rank_rule: columns (int) or share of energy (float) of the bases.
        threshold: the Φ both sides of a pair must reach.
        match: how modules were paired.
        source: the source base's name.
        target: the target base's name.
        modules: one row for every module of the LoRA, and one more for each further target.
        decisions: where each block of the target came from and what came second, where blocks were
            matched by similarity.
        dropped_blocks: the source's blocks that feed none, likewise.
        vectors: number of trained biases and tensors of normalisation layers carried over.
        left_out: tensor (or module) of the file that is not moved -> why.
        kept_energy: module -> share of its ‖ΔW_s‖² that was read, for updates of too high a rank
            for a LoRA; all others were read exactly.
        dry_run: True where only headers were read: rows then carry no measures.
        asked: the method asked for, where `method` was chosen for the user; else None.
        strength: the factor on every update.
        file_limit: bytes of the file that the updates were cut for; None where they were not.
        damping: κ of method "damped"; None for the others.
        verdict: what the weights of the two bases promise; None in a dry run.
        probe: the account of method "probe" (`probe.ProbeReport`); None for the others.
        seconds: wall time by stage.
    """

    method: str
    rank_rule: int | float
    threshold: float
    match: str
    source: str
    target: str
    modules: list[ModuleReport] = field(default_factory=list)
    decisions: tuple[BlockDecision, ...] = ()
    dropped_blocks: tuple[str, ...] = ()
    vectors: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    kept_energy: dict[str, float] = field(default_factory=dict)
    dry_run: bool = False
    asked: str | None = None
    strength: float = 1.0
    file_limit: int | None = None
    damping: float | None = None
    verdict: Verdict | None = None
    probe: Any = None
    seconds: dict[str, float] = field(default_factory=dict)

    def rows(self, status: str) -> list[ModuleReport]:
        """The rows with that status."""
        return [row for row in self.modules if row.status == status]

    @property
    def coverage(self) -> float:
        """The share of the LoRA's modules that found a place, 0 … 1."""
        names, placed = self._of_lora()
        return len(placed) / len(names) if names else 0.0

    def _of_lora(self) -> tuple[set[str], set[str]]:
        """The LoRA's modules, and those of them that found a place."""
        own = [row for row in self.modules if row.rank_in]
        return {row.source for row in own}, {
            row.source for row in own if row.status in ("mapped", "summed")
        }

    @property
    def totals(self) -> dict[str, Any]:
        """Counts, coverage and energies of the whole LoRA; the same keys for a dry run.

        mapped, summed, skipped, refused: rows. coverage: share of the LoRA's modules mapped or
        summed.
        energy_mapped: share of Σ‖ΔW_s‖² that the mapped modules hold. energy_surviving: Σ‖ΔW_t‖²
        over mapped modules' Σ‖ΔW_s‖². copy_distance: energy-weighted root mean square.
        energy_mixed, phi_left, phi_right: means over projected modules, None where there is none.
        flagged: modules whose bases missed their tolerance. Numbers that need weights are None in a
        dry run.
        """
        counts: dict[str, Any] = {status: len(self.rows(status)) for status in STATUSES}
        projected = [row for row in self.rows("mapped") if row.measures]
        everything = {row.source: row.energy for row in self.modules if row.onto is None}
        mapped = {row.source: row.energy for row in self.rows("mapped")}

        def mean(value: Any) -> float | None:
            weight = sum(row.energy for row in projected)
            if not weight:
                return None
            return float(sum(row.energy * value(row.measures) for row in projected) / weight)

        def written(value: Any) -> float | None:
            weight = sum(row.energy for row in self.rows("mapped"))
            if not weight or self.dry_run:
                return None
            return float(sum(row.energy * value(row) for row in self.rows("mapped")) / weight)

        total = sum(everything.values())
        squared_distance = written(lambda row: row.copy_distance**2)
        return counts | {
            "coverage": self.coverage,
            "energy_mapped": sum(mapped.values()) / total if total else None,
            "energy_surviving": written(lambda row: row.surviving_energy),
            "energy_mixed": mean(lambda m: m.range_null_energy + m.null_range_energy),
            "energy_cut": written(lambda row: row.rank_cut_energy),
            "phi_left": mean(lambda m: m.phi_left),
            "phi_right": mean(lambda m: m.phi_right),
            "copy_distance": None if squared_distance is None else math.sqrt(squared_distance),
            "flagged": sum(not row.measures.ok for row in projected if row.measures),
        }

    def strangers(self) -> list[ModuleReport]:
        """Mapped modules whose weights have nothing in common with those they were paired with.

        In a pair of related bases they are the mark of a wrong pairing: blocks were renumbered.
        """
        return [
            row
            for row in self.rows("mapped")
            if row.cosine is not None and row.cosine < STRANGE_COSINE
        ]

    def reasons(self) -> dict[tuple[str, str], int]:
        """How often each (status, reason) occurs among modules that are not mapped."""
        found: dict[tuple[str, str], int] = {}
        for row in self.modules:
            if row.status != "mapped":
                key = (row.status, row.reason)
                found[key] = found.get(key, 0) + 1
        return found

    def sentences(self) -> list[str]:
        """The result in plain words, the copy baseline included."""
        totals = self.totals
        names, placed = self._of_lora()
        added = f" ({totals['summed']} of them added to others)" if totals["summed"] else ""
        said = [
            f"{len(placed)} of {len(names)} modules moved from {self.source} to {self.target}"
            f"{added}; {totals['skipped']} skipped, {totals['refused']} refused."
        ]
        if self.vectors:
            said.append(
                f"{self.vectors} trained biases and normalisation tensors are carried over"
                f"{'' if self.strength == 1 else f' at strength {self.strength:.2g}'}."
            )
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            said.append(f"{len(self.left_out)} tensors of the file stay behind; {name}: {reason}.")
        if self.kept_energy:
            said.append(
                f"{len(self.kept_energy)} updates had too high a rank for a LoRA and were cut; the "
                f"one cut most keeps {min(self.kept_energy.values()):.1%} of its energy."
            )
        if self.probe is not None:
            said += self.probe.sentences()
            if self.method == "probe":
                return said
            said.append(
                f"So the LoRA moved by weights alone ('{self.method}') is written, at the strength "
                "that suits it best there."
            )
        if self.dry_run or totals["energy_surviving"] is None:
            return said
        if self.verdict:
            said.append(self.verdict.sentence())
        strangers = self.strangers()
        if strangers and self.verdict and self.verdict.related:
            said.append(describe_strangers([(row.source, str(row.target)) for row in strangers]))
        if self.asked == "auto" and self.verdict:
            said.append(f"Method 'auto' chose '{self.method}': {METHOD_REASONS[self.method]}.")
        said.append(
            f"The moved modules hold {totals['energy_mapped']:.0%} of the LoRA's energy; "
            f"'{self.method}' at strength {self.strength:.2g} keeps "
            f"{totals['energy_surviving']:.0%} of that, and its result is "
            f"{totals['copy_distance']:.0%} of the update's norm away from plain copying."
        )
        mixed = totals["energy_mixed"]
        if mixed is not None and mixed > 0.01 and self.method in ("prolora", "subspace"):
            said.append(
                f"{mixed:.0%} lay in the mixed blocks, which '{self.method}' "
                "drops; --method blocks keeps them, --method copy changes nothing."
            )
        if self.file_limit is not None:
            ranks = [row.rank_out for row in self.rows("mapped")]
            said.append(
                f"Cut to fit {self.file_limit / 1e6:.4g} MB: ranks {min(ranks)} to {max(ranks)}, "
                f"at the price of {totals['energy_cut']:.1%} of the energy."
            )
        if totals["flagged"]:
            said.append(f"{totals['flagged']} modules missed the accuracy tolerance (see 'ok').")
        return said

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; NaN becomes None."""
        fields = asdict(self) | {
            "decisions": [decision.to_dict() for decision in self.decisions],
            "totals": self.totals,
            "summary": self.sentences(),
        }
        return replace_nonfinite(fields)  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)
