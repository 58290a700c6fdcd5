"""Every update moved to its target module, by stacks of shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..architectures.modules import matrix_shape
from ..bases import Base
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.memory import Memory, Room
from ..comparison.overlap import align_bases
from .apply_method import copy_updates, project_updates
from .ledger import LORA_FAILURES, Ledger, Moved, share_time
from .plan import Pair


def move_all(
    ledgers: Sequence[Ledger],
    source: Base,
    target: Base,
    cache: BasisCache,
    memory: Memory,
    progress: Progress | None = None,
) -> None:
    """Moves every update of every LoRA; looks at each pair of weights once.

    The LoRAs are between the same two bases, with equal options but for what `auto` decided.
    `memory` bounds how much is worked on at a time; progress is called as progress(done, total,
    target module).
    """
    room = memory.room(sum(ledger.result_bytes for ledger in ledgers))
    for ledger in ledgers:
        if not ledger.method.needs_bases:
            ledger.add(partial(copy_updates, ledger))
    done = 0
    total = len({pair for ledger in ledgers for pair in ledger.plan.pairs})
    projected = [ledger for ledger in ledgers if ledger.method.needs_bases]
    for stack in _project_stacks(projected, source, target, cache, room):
        done += len(stack)
        if progress:
            progress(min(done, total), total, stack[-1].target)


def _iterate_stacks(ledgers: Sequence[Ledger], room: Room) -> Iterator[list[Pair]]:
    """Yields the pairs of all LoRAs in stacks of one shape that memory allows."""
    shapes: dict[tuple[int, ...], dict[Pair, None]] = {}
    for ledger in ledgers:
        for shape, pairs in ledger.plan.groups().items():
            shapes.setdefault(shape, {}).update(dict.fromkeys(pairs))
    for shape, alike in shapes.items():
        pairs = list(alike)
        size = room.stack(matrix_shape(shape), "bases")
        for i in range(0, len(pairs), size):
            yield pairs[i : i + size]


def _project_stacks(
    ledgers: Sequence[Ledger], source: Base, target: Base, cache: BasisCache, room: Room
) -> Iterator[list[Pair]]:
    """Moves every pair, for every LoRA, by a method that needs subspaces; gives each stack."""
    if not ledgers:
        return
    rank, device = ledgers[0].options.rank, ledgers[0].options.device
    stacks = list(_iterate_stacks(ledgers, room))
    modules = [([pair.source for pair in s], [pair.target for pair in s]) for s in stacks]
    bases = cache.in_turn(
        (
            partial(cache.look_up, base, names, rank)
            for both in modules
            for base, names in zip((source, target), both, strict=True)
        ),
        rank,
        device,
    )
    for stack, (origins, targets) in zip(stacks, modules, strict=True):
        with share_time(ledgers, "svd"):
            ours, theirs = next(bases), next(bases)
        with share_time(ledgers, "overlap"):
            names = cache.names(source, origins, rank), cache.names(target, targets, rank)
            pairs = list(zip(*names, strict=True))
            aligned = align_bases(pairs, ours, theirs, cache.pairs(source, target))
        with share_time(ledgers, "project"):
            step = partial(project_updates, source=ours, target=theirs, aligned=aligned)
            _move_in_turn(ledgers, stack, room, step)
        yield stack


def _move_in_turn(
    ledgers: Sequence[Ledger], stack: list[Pair], room: Room, step: Callable[..., list[Moved]]
) -> None:
    """Calls a step for LoRAs of one rank at the same indices of a stack.

    As step(ledgers, stack, places). A step returns the results of the first LoRA at all indices,
    then of the second and so on. Steps run one after the other: torch's own threads share a stack
    better than threads that share Python.
    """
    for together, places in _group_equal_ranks(
        ledgers, stack, room.columns(matrix_shape(stack[0].shape))
    ):
        try:
            moved = step(together, stack, places)
        except LORA_FAILURES as error:
            for ledger in together:
                ledger.error = error
            continue
        for i, ledger in enumerate(together):
            results = moved[i * len(places) : (i + 1) * len(places)]
            ledger.add(partial(list, results))


def _group_equal_ranks(
    ledgers: Sequence[Ledger], stack: list[Pair], columns: int
) -> list[tuple[list[Ledger], list[int]]]:
    """Groups LoRAs with equal ranks at the same indices of a stack.

    A group has as many LoRAs and indices as keep its factors within `columns` columns, and at least
    one of each.
    """
    groups: dict[tuple[int, ...], list[Ledger]] = {}
    for ledger in ledgers:
        if ledger.error is not None:
            continue
        pairs, updates = set(ledger.plan.pairs), ledger.adapter.updates
        ranks: dict[int, list[int]] = {}
        for i, pair in enumerate(stack):
            if pair in pairs:
                ranks.setdefault(updates[pair.source].rank, []).append(i)
        for rank, places in ranks.items():
            groups.setdefault((rank, *places), []).append(ledger)
    pieces = []
    for (rank, *places), alike in groups.items():
        most = max(1, columns // max(1, rank))
        several = max(1, most // len(places))
        size = -(-len(places) // -(-len(places) // most))  # pieces of about equal size
        pieces += [
            (alike[i : i + several], places[j : j + size])
            for i in range(0, len(alike), several)
            for j in range(0, len(places), size)
        ]
    return pieces
