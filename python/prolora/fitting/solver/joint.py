"""The fit of a probing: from its questions and its start to all updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.lowrank import LowRank
from ...errors import ShapeMismatch
from ..checkpoint import hash_texts, hash_updates
from ..energies import measure_disagreement, share_by_origin
from ..gate import DOUBT, fits_target, measure_missing
from ..probe_run import ProbeRun
from ..recording.at_rest import lay_aside
from ..recording.translation import PAIR, Question
from ..recording.wanted import WantedChange
from ..settings import Start
from ..updates import run_beside
from .joint_fit import JointProblem, cut_updates, fit_in_factors
from .linearisation import ProbeBatch

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
    look: float = 0.0,  # the share of the source's look that is wanted
) -> StartingPoint:
    """Chooses between zero and copied updates.

    What the copy misses of the wanted change, m = 1 − share, has two causes. The copy may be wrong
    (blocks are missing, or learnt something else), which a fit repairs. Or the wanted change is
    wrong for this target, because the bases themselves predict something else; by that much, about
    DOUBT·disagreement, a fit would harm. If the two errors are independent, the best point on the
    line from the copy to the wanted change is at 1 − DOUBT·disagreement/m of the way. Of the
    disagreement a share `look` is wanted, and no error.

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
    trust = 1 - DOUBT * (1 - look) * differ / missing
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


DAMPING = 1.0
"""Of the curvature, relative to its mean diagonal."""
BATCHES_TO_TRY_COPY = 4
"""Batches of full size whose samples decide where the fit starts."""


def fit_all_modules(
    run: ProbeRun, questions: Sequence[Question], names: list[str]
) -> dict[str, LowRank]:
    """Fits the updates of all modules; the rival's may be a start.

    The run's report gets the steps and the start.
    """
    target, translation = run.recorder.target, run.recorder.translation
    checkpoints, report = run.recorder.checkpoints, run.report
    key = ""
    if checkpoints.folder is not None:
        key = hash_texts(run.key, run.settings.describe_fit(), hash_updates(run.rival))
    kept = checkpoints.recall_updates("joint", key)
    if kept is not None:
        updates, facts = kept
        report.steps, report.resumed = facts["steps"], 1
        report.start, report.trust, report.start_reason = facts["start"]
        return updates
    batches = _BatchQueue(run, questions)
    first = batches.ask_models()
    run.release()
    run.meter.begin("fit")
    read, same_noise = translation.read, translation.same_noise
    asked, look = run.settings.start, run.settings.look_of_source
    start = choose_start(asked, target, run.rival, first, read, same_noise, look)
    report.start, report.trust, report.start_reason = start.name, start.trust, start.reason
    updates = _fit_part_way(run, batches, names, start) if start.trust else dict(run.rival)
    facts = {"steps": report.steps, "start": [start.name, start.trust, start.reason]}
    checkpoints.store_updates("joint", key, updates, facts)
    return updates


def _fit_part_way(
    run: ProbeRun, batches: _BatchQueue, names: list[str], start: StartingPoint
) -> dict[str, LowRank]:
    """Returns updates part of the way from start to fit, and outside copies."""
    inside = {name: update for name, update in start.updates.items() if name in names}
    outside = {name: update for name, update in start.updates.items() if name not in names}
    settings, rank, target = run.settings, run.settings.rank, run.recorder.target
    assert rank is not None
    own = max(update.rank for update in run.recorder.adapter.updates.values())
    problem = JointProblem(
        target,
        names,
        run.recorder.translation.read,
        batches.draw,
        settings.fit_steps,
        DAMPING,
        int(rank) if rank >= 1 else own,
        will_be_cut=start.trust < 1 or rank < 1,
    )
    with run_beside(target, outside):  # these copies do not change during the fit
        fit = fit_in_factors(
            problem,
            inside,
            lambda step: run.meter.tell(f"step {step + 1}"),
        )
    run.report.steps = fit.history
    if start.trust < 1:
        fit = replace(fit, updates=move_part_way(inside, fit.updates, start.trust))
    updates = cut_updates(fit, rank) if problem.will_be_cut else fit.updates
    return updates | outside


class _BatchQueue:
    """The probes of a joint fit: every probe is drawn once before any is drawn again."""

    def __init__(self, run: ProbeRun, questions: Sequence[Question]) -> None:
        self.run, self.questions = run, questions
        self.asked: list[Callable[[], tuple[Tensor, ...]]] = []
        self.sizes: list[int] = []
        self.queue: list[int] = []

    def ask_models(self) -> list[WantedChange]:
        """Computes and stores the wanted prediction of every probe; returns the first few."""
        run, first = self.run, list[WantedChange]()
        for wanted in run.wanted_changes(self.questions):
            sizes = [len(other.plain) for other in first]
            few = sum(sizes) < BATCHES_TO_TRY_COPY * max(sizes, default=1)
            if few and wanted.call.origin != PAIR:
                first.append(wanted)
            run.meter.tell("asking")
            self.asked.append(lay_aside((wanted.plain, wanted.plain + wanted.change)))
            self.sizes.append(len(wanted.plain))
        return first

    def draw(self) -> list[ProbeBatch]:
        """Draws the batches of one step, at least the samples that the settings ask for."""
        drawn: list[int] = []
        while sum(self.sizes[i] for i in drawn) < (self.run.settings.batch or 1):
            if not self.queue:
                self.queue.extend(range(len(self.questions)))
            drawn.append(self.queue.pop(0))
        return [ProbeBatch(self.questions[i].target, *self.asked[i]()) for i in drawn]
