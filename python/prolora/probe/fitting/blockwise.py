"""Strategy "blocks": one block after the other, each fitted to its wanted residual streams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.lowrank import LowRank
from ..checkpoint import hash_texts, hash_updates
from ..probe_run import FittedModules, ProbeRun
from ..recording.spill import SpilledRows, SpillStore, TargetCalls, spill_calls
from ..recording.translation import Question
from ..report import BlockReport
from ..settings import FitSettings
from ..updates import apply_updates
from .block_fit import BlockProblem, fit_block
from .blocks import as_streams, capture_inputs
from .low_rank import cut_to_rank
from .wanted_streams import WantedStreams

STEP_LENGTHS = (1.0, 0.5, 0.25)
"""Fractions of a step that are tried."""

CUT_DAMPING = 1e-3
"""Of the Gram matrices at the cut to low rank, relative to their mean eigenvalue."""


def fit_blocks(
    run: ProbeRun, questions: Sequence[Question], modules: FittedModules
) -> dict[str, LowRank]:
    """The updates of every block, in the order in which the blocks run; see docs/probe.md.

    Args:
        run: the probing; its report gets a row for every block.
        questions: the probes.
        modules: the modules that get an update.
    """
    wanted = WantedStreams(run, questions, modules)
    updates: dict[str, LowRank] = {}
    for i, block in enumerate(modules.by_block):
        run.notify(i, len(modules.by_block), block)
        fitted, row = _recall_or_fit(run, wanted, block, updates)
        run.report.blocks.append(row)
        updates |= fitted
    return updates


def _recall_or_fit(
    run: ProbeRun, wanted: WantedStreams, block: str, updates: dict[str, LowRank]
) -> tuple[dict[str, LowRank], BlockReport]:
    """The updates of one block, given those of the blocks before it."""
    name, key = f"block-{wanted.blocks.index(block)}", ""
    if run.checkpoints.folder is not None:
        key = hash_texts(run.key, run.settings.describe_fit(), block, hash_updates(updates))
    kept = run.checkpoints.recall_updates(name, key)
    if kept is not None:
        run.report.resumed += 1
        fitted, facts = kept
        reached, explained = facts["reached"], tuple(facts["explained"])
    else:
        rows = wanted.rows_of(block)  # computed from the target without updates
        with apply_updates(run.target, updates):
            fitted, reached = _fit_one_block(run, wanted, block, rows)
        explained = wanted.explained.get(block, ())
        facts = {"reached": reached, "explained": explained}
        run.checkpoints.store_updates(name, key, fitted, facts)
    wanted.remove(block)
    return fitted, BlockReport(block, explained, reached, len(fitted))


def _fit_one_block(
    run: ProbeRun, wanted: WantedStreams, block: str, rows: SpilledRows
) -> tuple[dict[str, LowRank], float]:
    """The updates of one block, and the share of the wanted change that they reach.

    The last block is fitted to the prediction, through the complete model.
    """
    if block == wanted.blocks[-1]:
        problem = _build_last_problem(run, wanted, rows)
    else:
        problem = _build_problem(run, wanted, block, rows)
    small = _solve_block(problem, run.settings)
    reached = _share_reached(problem, {name: update.dense() for name, update in small.items()})
    if block != wanted.blocks[-1]:
        small = {f"{block}.{name}": update for name, update in small.items()}
    return small, reached


def _build_last_problem(run: ProbeRun, wanted: WantedStreams, rows: SpilledRows) -> BlockProblem:
    """The model from its inputs to the prediction, with the last block's weights free."""
    block = wanted.blocks[-1]
    return BlockProblem(
        run.target,
        [f"{block}.{name}" for name in wanted.modules.by_block[block]],
        TargetCalls(wanted.questions),
        rows,
        lambda result: (run.translation.read(result),),
        run.settings.fit_ridge,
        run.settings.iterations,
    )


def _build_problem(
    run: ProbeRun, wanted: WantedStreams, block: str, rows: SpilledRows
) -> BlockProblem:
    """One block, from its inputs with the updates before it in place to its streams."""
    inputs = (capture_inputs(run.target, block, q.target) for q in wanted.questions)
    return BlockProblem(
        run.target.get_submodule(block),
        wanted.modules.by_block[block],
        spill_calls(inputs, SpillStore(run.settings.share_memory(4)), block),
        rows,
        as_streams,
        run.settings.fit_ridge,
        run.settings.iterations,
    )


def _solve_block(problem: BlockProblem, settings: FitSettings) -> dict[str, LowRank]:
    """Gauss–Newton steps, each as long as it helps, and then the cut to rank."""
    total = {name: torch.zeros_like(w) for name, w in problem.weights().items()}
    best = 0.0
    for _ in range(settings.rounds):
        in_place = {name: LowRank(d, torch.eye(d.shape[1]).to(d)) for name, d in total.items()}
        with apply_updates(problem.module, in_place):
            step, grams = fit_block(problem)
        trials = {
            length: {n: (d + length * step[n]).to(d.dtype) for n, d in total.items()}
            for length in STEP_LENGTHS
        }
        reached = {length: _share_reached(problem, trial) for length, trial in trials.items()}
        length = max(reached, key=lambda candidate: reached[candidate])
        if reached[length] <= best:
            break  # no step helps
        total, best = trials[length], reached[length]
    return {
        name: cut_to_rank(d.double(), None, grams[name], settings.rank, CUT_DAMPING)
        for name, d in total.items()
    }


@torch.no_grad()
def _share_reached(problem: BlockProblem, updates: dict[str, Tensor]) -> float:
    """1 − Σ‖wanted − output with updates‖²/Σ‖wanted − output without‖²."""
    start = problem.weights()
    moved = {name: start[name] + update for name, update in updates.items()}
    left = total = 0.0
    for call, wanted in zip(problem.calls, problem.wanted, strict=True):
        outputs = [problem.outputs(call, weights) for weights in (start, moved)]
        for w, before, after in zip(wanted, *outputs, strict=True):
            total += float((w - before).double().square().sum())
            left += float((w - after).double().square().sum())
    return 1 - left / total if total else 1.0
