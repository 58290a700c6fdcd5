"""A fit from its probes: where it starts, its steps, and the way back from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...core.lowrank import LowRank
from ..gate import DOUBT, fits_target, measure_disagreement, measure_missing, share_by_origin
from ..probes import PAIR, Asking, Probe
from ..settings import FitSettings
from ..updates import with_lora
from ..workload import Meter
from .joint_fit import JointProblem, cut_updates, fit_in_factors
from .linearisation import ProbeBatch

LEAST_COPY_SHARE = 0.1
"""Share of the wanted change that a copy must reach to be a start."""
LEAST_TRUST = 0.1
"""Below this share of the way a fit is not worth its time."""
DAMPING = 1.0
"""Of the curvature, relative to its mean diagonal."""
SAMPLES_TO_TRY_COPY = 48
"""Samples that decide where the fit starts."""


@dataclass(frozen=True)
class StartingPoint:
    """Where a fit starts."""

    name: str  # "zero" or "copy"
    trust: float  # share of the way from the start to the fit that is gone; 0 means no fit
    reason: str  # one clause, for the report
    updates: Mapping[str, LowRank] = field(default_factory=dict)  # of the target, to start from


def choose_start(
    asking: Asking,
    copied: Mapping[str, LowRank],  # updates of the target; may be empty
    probes: Sequence[Probe],  # some of the fit's probes, of states
) -> StartingPoint:
    """Chooses between zero and copied updates.

    What the copy misses of the wanted change, m = 1 − share, has two causes. The copy may be wrong
    (blocks are missing, or learnt something else), which a fit repairs. Or the wanted change is
    wrong for this target, because the bases themselves predict something else; by that much, about
    DOUBT·disagreement, a fit would harm. If the two errors are independent, the best point on the
    line from the copy to the wanted change is at 1 − DOUBT·disagreement/m of the way. Of the
    disagreement a share `look` is wanted, and no error.

    With noise of its own for either model the bases' disagreement says nothing of the wanted
    change, and the fit goes all the way.
    """
    if not copied or not fits_target(asking.target.denoiser, copied):
        return StartingPoint("zero", 1.0, "no copy fits the target")
    share = share_by_origin(probes, measure_missing(asking.target, copied, probes))["all"]
    if share < LEAST_COPY_SHARE:
        return StartingPoint("zero", 1.0, f"the copy reaches {share:.0%} of the wanted change")
    missing = max(1 - share, 1e-9)
    differ = measure_disagreement(probes)["all"] if asking.shared else 0.0
    trust = 1 - DOUBT * (1 - asking.look) * differ / missing
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


def solve(
    asking: Asking,
    probes: Sequence[Probe],
    names: Sequence[str],  # modules of the target that get an update
    baseline: Mapping[str, LowRank],  # updates that may be the start
    settings: FitSettings,
    meter: Meter,
) -> tuple[dict[str, LowRank], dict[str, Any]]:
    """Fits the updates of all modules; copies outside of these stay as they are.

    Also returns facts for the report: where it started and why, its trust, and its steps.
    """
    states = [probe for probe in probes if probe.origin != PAIR]
    few = states[: max(SAMPLES_TO_TRY_COPY // max(len(states[0]), 1), 1)]
    start = choose_start(asking, baseline, few)
    facts = {"start": start.name, "trust": start.trust, "start_reason": start.reason}
    if not start.trust:
        return dict(baseline), facts
    inside = {name: update for name, update in start.updates.items() if name in names}
    outside = {name: update for name, update in start.updates.items() if name not in names}
    rank, target = settings.rank, asking.target
    assert rank is not None
    own = max(update.rank for update in asking.updates.values())
    problem = JointProblem(
        target.denoiser,
        names,
        target.read,
        _Queue(asking, probes, settings.batch or 1).draw,
        settings.fit_steps,
        DAMPING,
        int(rank) if rank >= 1 else own,
        will_be_cut=start.trust < 1 or rank < 1,
    )

    def on_step(step: int) -> None:
        meter.advance(1 / settings.fit_steps if step else 0.0, f"step {step + 1}")

    with with_lora(target.denoiser, outside):  # these copies do not change during the fit
        fit = fit_in_factors(problem, inside, on_step)
    if start.trust < 1:
        fit = replace(fit, updates=move_part_way(inside, fit.updates, start.trust))
    updates = cut_updates(fit, rank) if problem.will_be_cut else fit.updates
    return updates | outside, facts | {"steps": fit.history}


class _Queue:
    """The probes of a fit: every one is drawn once before any is drawn again."""

    def __init__(self, asking: Asking, probes: Sequence[Probe], least: int) -> None:
        self.target, self.probes, self.least, self.next = asking.target, probes, least, 0

    def draw(self) -> list[ProbeBatch]:
        """Draws the batches of one step, at least the samples that the settings ask for."""
        drawn: list[ProbeBatch] = []
        count, device = 0, self.target.device
        while count < self.least:
            probe = self.probes[self.next % len(self.probes)]
            self.next += 1
            count += len(probe)
            call = self.target.build_call(probe.target, probe.level, probe.prompts)
            wanted = probe.plain + probe.change
            drawn.append(ProbeBatch(call, probe.plain.to(device), wanted.to(device)))
        return drawn
