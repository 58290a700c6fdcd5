"""Every update moved to its target module, by stacks of shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from ..architectures.modules import matrix_shape
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.memory import Memory, Room
from ..comparison.overlap import Alignment, align_bases
from ..core.basis import Basis
from ..core.lowrank import LowRank
from ..core.projection import project_factors
from ..reports.module_report import Measures
from .ledger import Ledger, Moved
from .plan import Pair


def move_updates(
    ledger: Ledger, cache: BasisCache, memory: Memory, progress: Progress | None = None
) -> None:
    """Moves every update of a LoRA, and enters the results into its ledger.

    `memory` bounds how much is worked on at a time; progress is called as progress(done, total,
    target module).
    """
    updates, pairs = ledger.adapter.updates, ledger.plan.pairs
    if not ledger.method.needs_bases:
        for pair in pairs:
            ledger.enter(Moved(pair, updates[pair.source], ledger.method.outcome))
        return
    source, target, rank = ledger.source, ledger.target, ledger.options.rank
    room = memory.room(ledger.result_bytes)
    stacks = list(_iterate_stacks(ledger, room))
    modules = [([pair.source for pair in s], [pair.target for pair in s]) for s in stacks]
    requests = (
        partial(cache.look_up, base, names, rank)
        for both in modules
        for base, names in zip((source, target), both, strict=True)
    )
    bases = cache.in_turn(requests, rank, ledger.options.device)
    done = 0
    for stack, (origins, targets) in zip(stacks, modules, strict=True):
        with ledger.clock("svd"):
            ours, theirs = next(bases), next(bases)
        with ledger.clock("overlap"):
            names = cache.names(source, origins, rank), cache.names(target, targets, rank)
            named = list(zip(*names, strict=True))
            aligned = align_bases(named, ours, theirs, cache.pairs(source, target))
        with ledger.clock("project"):
            columns = room.columns(matrix_shape(stack[0].shape))
            for part in _group_equal_ranks(ledger, stack, columns):
                chosen = [stack[i] for i in part]
                known = ours.take(part), theirs.take(part), aligned.take(part)
                for moved in _project_updates(ledger, chosen, *known):
                    ledger.enter(moved)
        done += len(stack)
        if progress:
            progress(done, len(pairs), stack[-1].target)


def _iterate_stacks(ledger: Ledger, room: Room) -> Iterator[list[Pair]]:
    """Yields the pairs in stacks of one shape that memory allows."""
    for shape, pairs in ledger.plan.groups().items():
        size = room.stack(matrix_shape(shape), "bases")
        for i in range(0, len(pairs), size):
            yield pairs[i : i + size]


def _group_equal_ranks(ledger: Ledger, stack: list[Pair], columns: int) -> Iterator[list[int]]:
    """Groups the indices of a stack by rank.

    A group has one update, or as many as `columns` columns hold.
    """
    ranks: dict[int, list[int]] = {}
    for i, pair in enumerate(stack):
        ranks.setdefault(ledger.adapter.updates[pair.source].rank, []).append(i)
    for rank, alike in ranks.items():
        most = max(1, columns // max(1, rank))
        size = -(-len(alike) // -(-len(alike) // most))  # pieces of about equal size
        for i in range(0, len(alike), size):
            yield alike[i : i + size]


def _project_updates(
    ledger: Ledger, pairs: list[Pair], source: Basis, target: Basis, aligned: Alignment
) -> Iterator[Moved]:
    """Projects updates of one rank; skips pairs whose weights overlap less than the threshold.

    Bases and alignment belong to the pairs, in their order.
    """
    options = ledger.options
    updates = [ledger.adapter.updates[pair.source] for pair in pairs]
    up, down = (
        torch.stack(factors).to(options.device)
        for factors in ([x.up for x in updates], [x.down for x in updates])
    )
    projected = project_factors(LowRank(up, down), source, target, options.method, aligned.similar)
    info, recompressed = projected.info, projected.recompressed()
    rungs = ["+".join(sorted(set(both))) for both in zip(source.rungs, target.rungs, strict=True)]
    measured = Measures.of(info, rungs, aligned.angles_left, aligned.angles_right)
    numbers = info.energy, info.surviving_energy, info.norm_ratio, info.copy_distance
    lists = (x.flatten().tolist() for x in numbers)
    for pair, update, measures, energy, surviving, ratio, distance in zip(
        pairs, recompressed, measured, *lists, strict=True
    ):
        low = min(measures.phi_left, measures.phi_right) < options.threshold
        side = "left" if measures.phi_left <= measures.phi_right else "right"
        why = f"Φ {side} below the threshold {options.threshold:g}"
        what = ledger.method.outcome
        moved = Moved(pair, update, what, energy, surviving, ratio, distance, measures)
        yield replace(moved, update=None, why=why) if low else moved
