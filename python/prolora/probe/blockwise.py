"""Block after block: the wanted residual streams, and the fit of one block at a time to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..core.lowrank import LowRank
from . import block_fit, checkpoint
from .blocks import as_streams, capture_inputs, read_streams
from .checkpoint import Checkpoints
from .low_rank import cut_to_rank
from .recording import TargetCalls
from .report import BlockReport, ProbeReport
from .ridge_map import RidgeMap, source_features
from .settings import FitSettings
from .spill import SpilledRows, SpillStore, spill_calls
from .trajectories import apply_updates
from .translation import Question, Read, Translation

STEP_LENGTHS = (1.0, 0.5, 0.25)
CUT_DAMPING = 1e-3
"""Of the Gram matrices at the cut to low rank, relative to their mean eigenvalue."""
MAP_BYTES = 4 << 30
"""Of covariances and maps that are held at a time."""


def fit_blocks(
    source: nn.Module,
    target: nn.Module,
    adapter: Adapter,
    calls: Sequence[Question],
    theirs: Sequence[str],
    places: dict[str, list[str]],
    between: Translation,
    options: FitSettings,
    report: ProbeReport,
    keep: Checkpoints,
    made_of: str,
    told: Callable[[int, str], None],
) -> dict[str, LowRank]:
    """The updates of every block, in the order in which they run; see docs/probe.md.

    Args:
        source: the source.
        target: the target.
        adapter: the LoRA.
        calls: the probes.
        theirs: names of the source's blocks.
        places: target block -> names inside it of the linear modules that get an update.
        between: translates calls and predictions.
        options: see there.
        report: gets a row for every block.
        keep: where fitted blocks are kept.
        made_of: what all of it depends on, besides the options.
        told: called with the number of blocks done and the name of the next.
    """
    shelf = SpillStore(None if options.max_memory is None else options.max_memory // 2)
    names = list(places)
    report.blocks = [BlockReport(name, (), float("nan"), 0) for name in names]
    groups = _group_blocks(source, target, calls, theirs, names, options)
    updates: dict[str, LowRank] = {}
    for i, name in enumerate(names):
        told(i, name)
        last = i == len(names) - 1
        key = (
            ""
            if keep.folder is None
            else checkpoint.hash_texts(
                made_of, options.told(), name, checkpoint.hash_updates(updates)
            )
        )
        wanted = SpilledRows(shelf, "" if last else name, len(calls))
        found = keep.fitted(f"block-{i}", key)
        if found is None:
            if (0, wanted.name) not in shelf:
                group = next(group for group in groups if name in group)
                _store_wanted_streams(
                    source,
                    target,
                    adapter,
                    calls,
                    theirs,
                    group[group.index(name) :],
                    names,
                    between,
                    options,
                    report,
                    shelf,
                )
            fitted = _fit_block(
                target,
                name,
                places[name],
                calls,
                wanted,
                updates,
                between.read,
                options,
                report,
            )
            row = report.blocks[i]
            told_row = {"reached": row.reached, "explained": row.explained}
            keep.keep_fitted(f"block-{i}", key, fitted, told_row)
        else:
            fitted, facts = found
            report.blocks[i] = replace(
                report.blocks[i],
                reached=facts["reached"],
                modules=len(fitted),
                explained=tuple(facts["explained"]),
            )
            report.resumed += 1
        if (0, wanted.name) in shelf:
            wanted.drop()
        updates |= fitted
    return updates


@torch.no_grad()
def _group_blocks(
    source: nn.Module,
    target: nn.Module,
    calls: Sequence[Question],
    theirs: Sequence[str],
    names: list[str],
    options: FitSettings,
) -> list[list[str]]:
    """The target's blocks in runs whose maps, and wanted streams, fit into memory together.

    Each run costs passes of its own over the calls, so there are as few as can be.
    """
    before = read_streams(source, theirs, calls[0].source)
    plain = read_streams(target, names[:-1], calls[0].target)
    most = None if options.max_memory is None else options.max_memory // 2
    groups: list[list[str]] = [[]]
    maps = held = 0
    for at, name in enumerate(names):
        map_bytes = stream_bytes = 0
        for i, stream in enumerate(plain.get(name, ())):
            x = source_features(before, i, stream.shape[1], at / max(1, len(names) - 1))
            p, q = 0 if x is None else x.shape[-1], stream.shape[-1]
            map_bytes += 8 * p * (p + q)
            stream_bytes += stream.numel() * stream.element_size() * len(calls)
        full = maps + map_bytes > MAP_BYTES or (most is not None and held + stream_bytes > most)
        if full and groups[-1]:
            groups.append([])
            maps = held = 0
        groups[-1].append(name)
        maps, held = maps + map_bytes, held + stream_bytes
    return groups


@torch.no_grad()
def _store_wanted_streams(
    source: nn.Module,
    target: nn.Module,
    adapter: Adapter,
    calls: Sequence[Question],
    theirs: Sequence[str],
    group: Sequence[str],
    names: list[str],
    between: Translation,
    options: FitSettings,
    report: ProbeReport,
    shelf: SpillStore,
) -> None:
    """Puts on the shelf, by (call, block), the streams the blocks of a group should give out.

    The prediction, which the last block of all is fitted to, is under (call, "").

    Two rounds over the calls, the first for the covariances of the maps, the second to use them.
    """
    inner = [name for name in group if name != names[-1]]
    depth = {name: at / max(1, len(names) - 1) for at, name in enumerate(names)}
    maps = {(name, i): RidgeMap() for name in inner for i in range(2)}
    tell = options.progress or (lambda *_: None)
    for k, call in enumerate(calls):
        tell(k, 2 * len(calls), "mapping")
        if not inner:
            break
        before, plain = (
            read_streams(source, theirs, call.source),
            read_streams(target, inner, call.target),
        )
        for name in inner:
            for i, stream in enumerate(plain[name]):
                x = source_features(before, i, stream.shape[1], depth[name])
                if x is not None:
                    maps[name, i].add(x, stream)
    used = {key: found for key, found in maps.items() if found.count}
    for found in used.values():
        found.solve(options.map_ridge)
    for name in inner:
        explained = tuple(used[name, i].explained for i in range(2) if (name, i) in used)
        at = names.index(name)
        report.blocks[at] = replace(report.blocks[at], explained=explained)

    for k, call in enumerate(calls):
        tell(len(calls) + k, 2 * len(calls), "mapping")
        before, plain = (
            read_streams(source, theirs, call.source),
            read_streams(target, inner, call.target),
        )
        change = -between.of_source(source, call)
        with apply_updates(source, adapter.updates):
            after = read_streams(source, theirs, call.source)
            change += between.of_source(source, call)
        if names[-1] in group:
            shelf.put((k, ""), (between.of_target(target, call) + change,))
        for name in inner:
            parts = []
            for i, stream in enumerate(plain[name]):
                x, y = (
                    source_features(f, i, stream.shape[1], depth[name]) for f in (before, after)
                )
                if x is None or y is None:
                    parts.append(stream)  # no block of the source has this resolution
                else:
                    parts.append(stream + used[name, i](y - x))
            shelf.put((k, name), tuple(parts))


def _fit_block(
    target: nn.Module,
    block: str,
    roles: list[str],
    calls: Sequence[Question],
    wanted: SpilledRows,
    updates: dict[str, LowRank],
    read: Read,
    options: FitSettings,
    report: ProbeReport,
) -> dict[str, LowRank]:
    """The updates of one block, with those of the blocks before it in place."""
    row = next(i for i, found in enumerate(report.blocks) if found.name == block)
    last = row == len(report.blocks) - 1
    with apply_updates(target, updates):
        if last:
            problem = block_fit.BlockProblem(
                target,
                [f"{block}.{role}" for role in roles],
                TargetCalls(calls),
                wanted,
                lambda result: (read(result),),
                options.fit_ridge,
                options.iterations,
            )
        else:
            limit = None if options.max_memory is None else options.max_memory // 4
            read_by = (capture_inputs(target, block, call.target) for call in calls)
            problem = block_fit.BlockProblem(
                target.get_submodule(block),
                roles,
                spill_calls(read_by, SpillStore(limit), block),
                wanted,
                as_streams,
                options.fit_ridge,
                options.iterations,
            )
        small = _solve_block(problem, options)
        reached = _share_reached(problem, {name: update.dense() for name, update in small.items()})
    old = report.blocks[row]
    report.blocks[row] = BlockReport(block, old.explained, reached, len(small))
    return small if last else {f"{block}.{role}": update for role, update in small.items()}


def _solve_block(problem: block_fit.BlockProblem, options: FitSettings) -> dict[str, LowRank]:
    """Gauss–Newton: linearise, solve, go as far as it helps, linearise there; then cut to rank."""
    total = {name: torch.zeros_like(w) for name, w in problem.weights().items()}
    best = 0.0
    for _ in range(options.rounds):
        in_place = {name: LowRank(d, torch.eye(d.shape[1]).to(d)) for name, d in total.items()}
        with apply_updates(problem.module, in_place):
            step, grams = block_fit.fit_block(problem)
        steps = {
            length: {n: (d + length * step[n]).to(d.dtype) for n, d in total.items()}
            for length in STEP_LENGTHS
        }
        reached = {length: _share_reached(problem, moved) for length, moved in steps.items()}
        length = max(reached, key=lambda found: reached[found])
        if reached[length] <= best:
            break  # no step helps
        total, best = steps[length], reached[length]
    return {
        name: cut_to_rank(d.double(), None, grams[name], options.rank, CUT_DAMPING)
        for name, d in total.items()
    }


@torch.no_grad()
def _share_reached(problem: block_fit.BlockProblem, updates: dict[str, Tensor]) -> float:
    """1 − Σ‖wanted − output with updates‖²/Σ‖wanted − output without‖²."""
    start = problem.weights()
    moved = {name: start[name] + update for name, update in updates.items()}
    left = whole = 0.0
    for call, wanted in zip(problem.calls, problem.wanted, strict=True):
        outputs = [problem.outputs(call, weights) for weights in (start, moved)]
        for w, before, after in zip(wanted, *outputs, strict=True):
            whole += float((w - before).double().square().sum())
            left += float((w - after).double().square().sum())
    return 1 - left / whole if whole else 1.0
