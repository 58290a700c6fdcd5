"""What a transfer kept and what it lost, module by module and in total."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .projection import ProjectionInfo

STATUSES = ("mapped", "skipped", "refused")


@dataclass(frozen=True)
class Measures:
    """The numbers of one mapped module; fields as in `projection.ProjectionInfo`, as floats.

    Attributes:
        phi_left, phi_right: subspace overlap Φ of source and target.
        chance_left, chance_right: what unrelated weights would score.
        above_left, above_right: (Φ − chance)/(1 − chance); NaN where chance is 1.
        columns_source, columns_target: k of the two bases.
        range_energy, null_energy, range_null_energy, null_range_energy: shares of ‖ΔW_s‖² in the
            four blocks of the source basis; the last two are what ProLoRA drops.
        surviving_energy: ‖ΔW_t‖²/‖ΔW_s‖² before the rank is cut.
        norm_ratio: ‖ΔW_t‖/‖ΔW_s‖ of what was written.
        copy_distance: ‖ΔW_t − ΔW_s‖/‖ΔW_s‖ before the rank is cut.
        rank_cut_energy: share of ‖ΔW_t‖² that --out-rank discarded.
        bound: upper bound on the sine of the largest angle between used and true bases.
        ok: whether that bound met the tolerance.
        rung: the algorithm that gave the bases.
    """

    phi_left: float
    phi_right: float
    chance_left: float
    chance_right: float
    above_left: float
    above_right: float
    columns_source: int
    columns_target: int
    range_energy: float
    null_energy: float
    range_null_energy: float
    null_range_energy: float
    surviving_energy: float
    norm_ratio: float
    copy_distance: float
    rank_cut_energy: float
    bound: float
    ok: bool
    rung: str

    @classmethod
    def of(cls, info: ProjectionInfo, i: int, rung: str) -> Measures:
        """The numbers of matrix i of a stack."""
        similar = info.similarity
        stack: dict[str, Any] = {
            "phi_left": similar.left,
            "phi_right": similar.right,
            "chance_left": similar.chance_left,
            "chance_right": similar.chance_right,
            "above_left": similar.above_left,
            "above_right": similar.above_right,
            "columns_source": info.rank_source,
            "columns_target": info.rank_target,
            "range_energy": info.range_energy,
            "null_energy": info.null_energy,
            "range_null_energy": info.range_null_energy,
            "null_range_energy": info.null_range_energy,
            "surviving_energy": info.surviving_energy,
            "norm_ratio": info.norm_ratio,
            "copy_distance": info.copy_distance,
            "bound": info.bound,
            "ok": info.ok,
        }
        return cls(
            **{name: values[i].item() for name, values in stack.items()},
            rank_cut_energy=0.0,
            rung=rung,
        )


@dataclass(frozen=True)
class ModuleReport:
    """One row: a module of the LoRA, and what became of it.

    Attributes:
        source: the module in the LoRA.
        target: where it went; None unless mapped.
        status: "mapped", "skipped" or "refused".
        reason: why it was skipped or refused; for a mapped module, how it was moved.
        shape: out × in of the update.
        rank_in: rank in the LoRA.
        rank_out: rank in the output; 0 unless mapped.
        energy: ‖ΔW_s‖², the weight of this row in the totals.
        measures: the numbers; None where nothing was projected.
    """

    source: str
    target: str | None
    status: str
    reason: str
    shape: tuple[int, ...]
    rank_in: int
    rank_out: int = 0
    energy: float = 0.0
    measures: Measures | None = None


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
        dry_run: True where only headers were read: rows then carry no measures.
        seconds: wall time by stage.
    """

    method: str
    rank_rule: int | float
    threshold: float
    match: str
    source: str
    target: str
    modules: list[ModuleReport] = field(default_factory=list)
    dry_run: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def rows(self, status: str) -> list[ModuleReport]:
        """The rows with that status."""
        return [row for row in self.modules if row.status == status]

    @property
    def coverage(self) -> float:
        """The share of the LoRA's modules that found a place, 0 … 1."""
        names = {row.source for row in self.modules}
        return len({row.source for row in self.rows("mapped")}) / len(names) if names else 0.0

    @property
    def totals(self) -> dict[str, Any]:
        """Counts, coverage and energies of the whole LoRA; the same keys for a dry run.

        mapped, skipped, refused: rows. coverage: share of the LoRA's modules mapped.
        energy_mapped: share of Σ‖ΔW_s‖² that the mapped modules hold. energy_surviving: Σ‖ΔW_t‖²
        over mapped modules' Σ‖ΔW_s‖². energy_mixed: the share of it in the two mixed blocks.
        copy_distance: energy-weighted root mean square. flagged: modules whose bases missed their
        tolerance. Numbers that need weights are None in a dry run.
        """
        counts: dict[str, Any] = {status: len(self.rows(status)) for status in STATUSES}
        projected = [row for row in self.rows("mapped") if row.measures]
        everything = {row.source: row.energy for row in self.modules}
        mapped = {row.source: row.energy for row in self.rows("mapped")}

        def mean(value: Any) -> float | None:
            weight = sum(row.energy for row in projected)
            if not weight:
                return None
            return float(sum(row.energy * value(row.measures) for row in projected) / weight)

        total = sum(everything.values())
        squared_distance = mean(lambda m: m.copy_distance**2)
        return counts | {
            "coverage": self.coverage,
            "energy_mapped": sum(mapped.values()) / total if total else None,
            "energy_surviving": mean(lambda m: m.surviving_energy),
            "energy_mixed": mean(lambda m: m.range_null_energy + m.null_range_energy),
            "energy_cut": mean(lambda m: m.rank_cut_energy),
            "phi_left": mean(lambda m: m.phi_left),
            "phi_right": mean(lambda m: m.phi_right),
            "copy_distance": None if squared_distance is None else math.sqrt(squared_distance),
            "flagged": sum(not row.measures.ok for row in projected if row.measures),
        }

    def reasons(self) -> dict[tuple[str, str], int]:
        """How often each (status, reason) occurs among skipped and refused modules."""
        found: dict[tuple[str, str], int] = {}
        for row in self.modules:
            if row.status != "mapped":
                key = (row.status, row.reason)
                found[key] = found.get(key, 0) + 1
        return found

    def sentences(self) -> list[str]:
        """The result in plain words, the copy baseline included."""
        totals = self.totals
        names = {row.source for row in self.modules}
        said = [
            f"{len({r.source for r in self.rows('mapped')})} of {len(names)} modules moved from "
            f"{self.source} to {self.target}; {totals['skipped']} skipped, "
            f"{totals['refused']} refused."
        ]
        if self.dry_run or totals["energy_surviving"] is None:
            return said
        said.append(
            f"They hold {totals['energy_mapped']:.0%} of the LoRA's energy; '{self.method}' keeps "
            f"{totals['energy_surviving']:.0%} of that, and its result is "
            f"{totals['copy_distance']:.0%} of the update's norm away from plain copying."
        )
        if totals["energy_mixed"] > 0.01 and self.method in ("prolora", "subspace"):
            said.append(
                f"{totals['energy_mixed']:.0%} lay in the mixed blocks, which '{self.method}' "
                "drops; --method blocks keeps them, --method copy changes nothing."
            )
        if totals["flagged"]:
            said.append(f"{totals['flagged']} modules missed the accuracy tolerance (see 'ok').")
        return said

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; NaN becomes None."""
        fields = asdict(self) | {"totals": self.totals, "summary": self.sentences()}
        return finite(fields)  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)


def finite(value: Any) -> Any:
    """NaN and infinities as None, all the way down: JSON has no words for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
