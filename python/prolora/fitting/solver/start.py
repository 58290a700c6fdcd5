"""The start of a joint fit, and how far it may move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...core.lowrank import LowRank
from ...errors import ShapeMismatch
from ..energies import measure_disagreement, share_by_origin
from ..gate import DOUBT, fits_target, measure_missing
from ..recording.wanted import WantedChange
from ..settings import Start

LEAST_COPY_SHARE = 0.1
"""Share of the wanted change that a copy must reach to be a start."""
LEAST_TRUST = 0.1
"""Below this share of the way a fit is not worth its time."""
NO_COPY = (
    "start 'copy' needs a LoRA that can be moved to the target by weights alone, and this one has "
    "no module of the target's names and shapes; use 'auto' or 'zero'"
)


@dataclass(frozen=True)
class StartingPoint:
    """Where a fit starts."""

    name: str  # "zero" or "copy"
    trust: float  # share of the way from the start to the fit that is gone; 0 means no fit
    reason: str  # one clause, for the report
    updates: Mapping[str, LowRank] = field(default_factory=dict)  # of the target, to start from


def check_start(asked: Start, target: nn.Module, copied: Mapping[str, LowRank]) -> None:
    """Refuses a start that does not exist, before anything is sampled."""
    if asked == "copy" and not (copied and fits_target(target, copied)):
        raise ShapeMismatch(NO_COPY)


def choose_start(
    asked: Start,  # "auto", "zero" or "copy"
    target: nn.Module,  # the target without updates
    copied: Mapping[str, LowRank],  # updates of the target; may be empty
    probes: Sequence[WantedChange],  # some of the fit's probes
    read: Callable[[Any], Tensor],  # return value of the target -> its prediction
    same_noise: bool = True,
) -> StartingPoint:
    """Chooses between zero and copied updates.

    What the copy misses of the wanted change, m = 1 − share, has two causes. The copy may be wrong
    (blocks are missing, or learnt something else), which a fit repairs. Or the wanted change is
    wrong for this target, because the bases themselves predict something else; by that much, about
    DOUBT·disagreement, a fit would harm. If the two errors are independent, the best point on the
    line from the copy to the wanted change is at 1 − DOUBT·disagreement/m of the way.

    Without `same_noise` the bases' disagreement says nothing of the wanted change, and the fit goes
    all the way.
    """
    fitting = bool(copied) and fits_target(target, copied)
    if asked == "zero" or not fitting:
        why = "as asked" if asked == "zero" else "no copy fits the target"
        return StartingPoint("zero", 1.0, why)
    share = share_by_origin(probes, measure_missing(target, copied, probes, 1.0, read))["all"]
    if asked == "auto" and share < LEAST_COPY_SHARE:
        return StartingPoint("zero", 1.0, f"the copy reaches {share:.0%} of the wanted change")
    missing = max(1 - share, 1e-9)
    differ = measure_disagreement(probes)["all"] if same_noise else 0.0
    trust = 1 - DOUBT * differ / missing
    if trust < LEAST_TRUST:
        reason = (
            f"the copy misses {missing:.0%} of the wanted change, no more than the bases' own "
            "predictions explain"
        )
        return StartingPoint("copy", 0.0, reason, copied)
    reason = f"the copy reaches {share:.0%} of the wanted change"
    return StartingPoint("copy", trust, reason, copied)


def move_part_way(
    start: Mapping[str, LowRank], fitted: Mapping[str, LowRank], trust: float
) -> dict[str, LowRank]:
    """Moves a share of the way from start to fit; ranks add up."""
    moved = {}
    for name, update in fitted.items():
        up, down = trust * update.up, update.down
        if name in start:
            origin = start[name].to(up.device).to(up.dtype)
            up = torch.cat([up, (1 - trust) * origin.up], 1)
            down = torch.cat([down, origin.down])
        moved[name] = LowRank(up, down)
    return moved
