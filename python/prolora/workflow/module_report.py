"""The numbers of a projected module, as a report keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.projection_info import ProjectionInfo
from ..core.similarity import ANGLE_SHARES

MEDIAN = ANGLE_SHARES.index(0.5)
"""Where the median is among the quantiles of angles."""


@dataclass(frozen=True)
class Measures:
    """The numbers of one projected module; fields as in `projection.ProjectionInfo`, as floats.

    Attributes:
        phi_left, phi_right: subspace overlap Φ of source and target.
        chance_left, chance_right: what unrelated weights would score.
        above_left, above_right: (Φ − chance)/(1 − chance); NaN where chance is 1.
        columns_source, columns_target: k of the two bases.
        range_energy, null_energy, range_null_energy, null_range_energy: shares of ‖ΔW_s‖² in the
            four blocks of the source basis; the last two are what ProLoRA drops.
        bound: upper bound on the sine of the largest angle between used and true bases.
        ok: whether that bound met the tolerance.
        rung: the algorithm that gave the bases.
        angles_left, angles_right: principal angles between the two subspaces in radians, at the
            shares `core.similarity.ANGLE_SHARES` of their number, smallest first.
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
    rung: str
    angles_left: tuple[float, ...]
    angles_right: tuple[float, ...]

    @property
    def angle(self) -> float:
        """The median principal angle of the side that is farther apart, in radians."""
        return max(self.angles_left[MEDIAN], self.angles_right[MEDIAN])

    @property
    def largest_angle(self) -> float:
        """The largest principal angle of either side, in radians."""
        return max(self.angles_left[-1], self.angles_right[-1])

    @classmethod
    def of(
        cls,
        info: ProjectionInfo,
        rungs: Sequence[str],
        left: Sequence[tuple[float, ...]],
        right: Sequence[tuple[float, ...]],
    ) -> list[Measures]:
        """The numbers of every update of a stack of pairs of weights, one or more for each pair.

        Args:
            info: of the updates, pair by pair.
            rungs: the algorithms behind the bases of each pair.
            left: its principal angles on the left.
            right: and on the right.
        """
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
            "bound": info.bound,
            "ok": info.ok,
        }
        each = info.energy.numel() // len(rungs)

        def listed(values: Sequence[Any]) -> list[Any]:
            """What a pair has is what each of its updates has."""
            return (
                [x for x in values for _ in range(each)] if len(values) == len(rungs) else [*values]
            )

        columns = [values.flatten().tolist() for values in stack.values()]
        rows = zip(*(listed(values) for values in (*columns, rungs, left, right)), strict=True)
        names = (*stack, "rung", "angles_left", "angles_right")
        return [cls(**dict(zip(names, row, strict=True))) for row in rows]
