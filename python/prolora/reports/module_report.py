"""One row of a report: what became of a module, and the numbers of its projection."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # rows are written without torch, too
    from ..adapters.adapter import Adapter
    from ..adapters.key_groups import Contents
    from ..core.lowrank import LowRank
    from ..core.projection_info import ProjectionInfo

STATUSES = ("mapped", "skipped", "refused")

LEFT_OUT = "left out as asked: its block has the factor 0"


@dataclass(frozen=True)
class Measures:
    """The numbers of one projected module; fields as in `ProjectionInfo`, as floats.

    Attributes:
        phi_left, phi_right: subspace overlap Φ of source and target.
        chance_left, chance_right: what unrelated weights would score.
        above_left, above_right: (Φ − chance)/(1 − chance); NaN where chance is 1.
        columns_source, columns_target: k of the two bases.
        range_energy, null_energy, range_null_energy, null_range_energy: shares of ‖ΔW_s‖² in the
            four blocks of the source basis; the last two are what ProLoRA drops.
        bound: upper bound on the sine of the largest angle between used and true bases.
        ok: whether that bound met the tolerance.
        solver: the algorithm that gave the bases.
        angles_left, angles_right: principal angles between the two subspaces in radians, at the
            shares `core.subspaces.ANGLE_SHARES` of their number, smallest first.
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
    bound: float
    ok: bool
    solver: str
    angles_left: tuple[float, ...]
    angles_right: tuple[float, ...]

    @property
    def angle(self) -> float:
        """The median principal angle of the side that is farther apart, in radians."""
        middle = len(self.angles_left) // 2
        return max(self.angles_left[middle], self.angles_right[middle])

    @property
    def mixed_energy(self) -> float:
        """The share of ‖ΔW_s‖² in the two mixed blocks."""
        return self.range_null_energy + self.null_range_energy

    @classmethod
    def of(
        cls,
        info: ProjectionInfo,
        solvers: Sequence[str],
        left: Sequence[tuple[float, ...]],
        right: Sequence[tuple[float, ...]],
    ) -> list[Measures]:
        """Lists the numbers of every update of a stack of weight pairs.

        Each pair has one update or more; `solvers` and the angles are a pair's.
        """
        similar = info.similarity
        stack = [
            *(similar.left, similar.right, similar.chance_left, similar.chance_right),
            *(similar.above_left, similar.above_right, info.rank_source, info.rank_target),
            *(info.range_energy, info.null_energy, info.range_null_energy),
            *(info.null_range_energy, info.bound, info.ok),
        ]
        each = info.energy.numel() // len(solvers)
        columns = [*(values.flatten().tolist() for values in stack), solvers, left, right]
        repeated = (
            [x for x in column for _ in range(each)] if len(column) == len(solvers) else column
            for column in columns
        )
        return [cls(*row) for row in zip(*repeated, strict=True)]


# Fields without meaning for a module that did not move; their defaults fit a copy.
_OF_A_MOVE = ("strength", "norm_ratio", "copy_distance", "rank_cut_energy")


@dataclass(frozen=True)
class ModuleReport:
    """One row: a module of the LoRA, and what became of it.

    Attributes:
        source: the module in the LoRA.
        target: where it went; None unless mapped, and where a dry run leaves the block to weights.
        status: "mapped", "skipped" or "refused".
        reason: why it was skipped or refused; for a mapped module, how it was moved.
        shape: out × in of the update.
        rank_in: rank in the LoRA; 0 for a module that the LoRA has no update of.
        rank_out: rank in the output; 0 unless mapped.
        energy: ‖ΔW_s‖²: the weight of this row in the totals; NaN where a dry run cannot know it.
        strength: factor on the update, on top of what the method does.
        drift: ‖W_t − W_s‖/‖W_s‖ of the module's weights; None where they were not compared.
        cosine: ⟨W_s, W_t⟩/(‖W_s‖‖W_t‖); None where they were not compared.
        norm_ratio: ‖ΔW_t‖/‖ΔW_s‖ of what was written.
        copy_distance: ‖ΔW_t − ΔW_s‖/‖ΔW_s‖ of what was written.
        rank_cut_energy: share of ‖ΔW_t‖² that cutting the rank discarded.
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
    norm_ratio: float = 1.0
    copy_distance: float = 0.0
    rank_cut_energy: float = 0.0
    measures: Measures | None = None

    def at_strength(self, strength: float) -> ModuleReport:
        """Returns the row of the same update multiplied by `strength`."""
        if strength == 1:
            return self
        # ‖sX − Δ‖² = s²‖X‖² + ‖Δ‖² − 2s⟨X, Δ⟩, in units of ‖Δ‖², with X at s = 1.
        energy = self.norm_ratio**2
        along = (energy + 1 - self.copy_distance**2) / 2
        distance = strength**2 * energy + 1 - 2 * strength * along
        return replace(
            self,
            strength=strength * self.strength,
            norm_ratio=abs(strength) * self.norm_ratio,
            copy_distance=math.sqrt(max(0.0, distance)),
        )

    def cut(self, original: LowRank, whole: LowRank, smaller: LowRank) -> ModuleReport:
        """Returns the row of an update that became `whole`, and was cut to `smaller`."""
        import torch

        from ..core.merging import subtract_updates

        energy = whole.norm().square().item()
        share = min(1.0, smaller.norm().square().item() / energy) if energy else 1.0
        apart = subtract_updates(smaller.to(torch.float64), original.to(torch.float64))
        norm = original.norm().item()
        return replace(
            self,
            rank_out=smaller.rank,
            rank_cut_energy=1 - (1 - self.rank_cut_energy) * share,
            norm_ratio=self.norm_ratio * share**0.5,
            copy_distance=apart.norm().item() / norm if norm else 0.0,
        )

    def to_dict(self, is_planned: bool = False) -> dict[str, Any]:
        """Returns all fields; measures of a move are None without one."""
        record = asdict(self)
        if is_planned or self.status != "mapped":
            record |= dict.fromkeys(_OF_A_MOVE)
        return record


def measure_coverage(rows: Iterable[ModuleReport]) -> float:
    """Returns the share of a LoRA's modules with a counterpart, 0 … 1."""
    names, placed = split_modules(rows)
    return len(placed) / len(names) if names else 0.0


def split_modules(rows: Iterable[ModuleReport]) -> tuple[set[str], set[str]]:
    """Returns the LoRA's modules, and the ones with a counterpart."""
    own = [row for row in rows if row.rank_in]
    placed = {row.source for row in own if row.status == "mapped"}
    return {row.source for row in own}, placed


def list_unread_modules(read: Adapter | Contents) -> list[ModuleReport]:
    """Lists the rows of modules with unread updates: refused, or left out."""
    return [
        ModuleReport(
            source=name,
            target=None,
            status="refused" if name in read.refused else "skipped",
            reason=read.left_out[name],
            shape=(out, inputs),
            rank_in=rank,
        )
        for name, (out, inputs, rank) in read.unread.items()
    ]
