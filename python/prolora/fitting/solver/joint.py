"""The fit of a probing: from its questions to the updates of all modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...core.lowrank import LowRank
from ..checkpoint import hash_texts, hash_updates
from ..probe_run import ProbeRun
from ..recording.spill import SpillStore
from ..recording.translation import PAIR, Question
from ..recording.wanted import WantedChange
from ..updates import run_beside
from .joint_fit import JointProblem, cut_updates, fit_in_factors
from .linearisation import ProbeBatch
from .start import StartingPoint, choose_start, move_part_way

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
    start = choose_start(run.settings.start, target, run.rival, first, read, same_noise)
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
            lambda step: run.meter.reach(step / settings.fit_steps, f"step {step + 1}"),
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
        self.store = SpillStore(run.settings.share_memory(2))
        self.sizes: list[int] = []
        self.queue: list[int] = []

    def ask_models(self) -> list[WantedChange]:
        """Computes and stores the wanted prediction of every probe; returns the first few."""
        run, first = self.run, list[WantedChange]()
        for i, wanted in enumerate(run.wanted_changes(self.questions)):
            sizes = [len(other.plain) for other in first]
            few = sum(sizes) < BATCHES_TO_TRY_COPY * max(sizes, default=1)
            if few and wanted.call.origin != PAIR:
                first.append(wanted)
            run.meter.reach((i + 1) / len(self.questions), "asking")
            self.store.put(i, (wanted.plain, wanted.plain + wanted.change))
            self.sizes.append(len(wanted.plain))
        return first

    def draw(self) -> list[ProbeBatch]:
        """Draws the batches of one step, at least the samples that the settings ask for."""
        drawn: list[int] = []
        while sum(self.sizes[i] for i in drawn) < (self.run.settings.batch or 1):
            if not self.queue:
                self.queue.extend(range(len(self.questions)))
            drawn.append(self.queue.pop(0))
        return [ProbeBatch(self.questions[i].target, *self.store.get(i)) for i in drawn]
