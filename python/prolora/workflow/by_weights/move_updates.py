"""Every update from its source module to its target, a stack of equal shapes at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...architectures.modules import matrix_shape
from ...bases import Base
from ...bases.base import Progress
from ...bases.cache.basis_cache import BasisCache
from ...bases.memory import Memory, Room
from ...comparison.overlap import Alignment, align_bases
from ...core.basis import Basis
from ...core.damping import Damper
from ...core.lowrank import LowRank
from ...core.methods import Method, Needs, find_method
from ...core.precision import is_finite
from ...core.projection import project_factors
from ...errors import NonFiniteWeights, ProLoRAError
from ..module_report import Measures, ModuleReport
from ..options import TransferOptions
from ..out_rank import cut_rank
from ..plan import Pair, Plan
from .assembly import describe_unchanged

LORA_FAILURES = (ProLoRAError, OSError, ArithmeticError, MemoryError, RuntimeError)
"""Errors that end the LoRA in which they happen and no other of the same call."""

Moved = tuple[Pair, LowRank | None, ModuleReport]


class Clock:
    """Adds up wall seconds by stage."""

    def __init__(self) -> None:
        """Starts with no stage."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times the body and adds it to the stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


@dataclass
class LoraWork:
    """One LoRA among those that are moved together.

    Attributes:
        adapter: what is moved.
        plan: where to.
        options: how, with method, strength and damping decided.
        clock: what was done for this LoRA alone, and for all of them.
        moved: what came of it, in the order in which it was done.
        error: why it was given up; the others go on.
        own_ranks: module -> the rank it has in the LoRA, where that is not the rank in `adapter`:
            updates of dropped blocks were added to it.
    """

    adapter: Adapter
    plan: Plan
    options: TransferOptions
    clock: Clock = field(default_factory=Clock)
    moved: list[Moved] = field(default_factory=list)
    error: Exception | None = None
    own_ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """How it is moved, once that is decided."""
        return find_method(self.options.method)

    def result_bytes(self) -> int:
        """What the moved updates take in memory, at most."""
        width = 1 if self.options.chosen is None else self.options.chosen.rank_factor
        updates = (self.adapter.updates[pair.source] for pair in self.plan.pairs)
        return sum(4 * width * (x.up.numel() + x.down.numel()) for x in updates)


def move_all(
    works: Sequence[LoraWork],
    source: Base,
    target: Base,
    cache: BasisCache,
    memory: Memory,
    progress: Progress | None = None,
) -> None:
    """Moves every update of every LoRA; each pair of weights is looked at once for all of them.

    Args:
        works: LoRAs between the same two bases, with equal options but for what `auto` decided.
        source: where they come from.
        target: where they go.
        cache: of the subspaces.
        memory: bounds how much is worked on at a time.
        progress: called as progress(done, total, target module).
    """
    room = memory.room(sum(work.result_bytes() for work in works))
    for work in works:
        if work.method.needs is Needs.NOTHING:
            try:
                work.moved += _finish_updates(_copy_updates(work), work)
            except LORA_FAILURES as error:
                work.error = error
    done = 0
    total = len({pair for work in works for pair in work.plan.pairs})
    for needs in (Needs.WEIGHTS, Needs.BASES):
        chosen = [work for work in works if work.method.needs is needs]
        for stack in _iterate_stacks(chosen, room, needs):
            if needs is Needs.WEIGHTS:
                _damp_stack(chosen, stack, source, target, room)
            else:
                _project_stack(chosen, stack, source, target, cache, room)
            done += len(stack)
            if progress:
                progress(min(done, total), total, stack[-1].target)


def _iterate_stacks(works: Sequence[LoraWork], room: Room, needs: Needs) -> Iterator[list[Pair]]:
    """The pairs of all LoRAs in stacks of one weight shape, none larger than memory allows."""
    shapes: dict[tuple[int, ...], dict[Pair, None]] = {}
    for work in works:
        for shape, pairs in work.plan.groups().items():
            shapes.setdefault(shape, {}).update(dict.fromkeys(pairs))
    for shape, found in shapes.items():
        pairs = list(found)
        size = room.stack(matrix_shape(shape), needs)
        for i in range(0, len(pairs), size):
            yield pairs[i : i + size]


def _stack_weights(base: Base, modules: list[str], shape: tuple[int, ...]) -> Tensor:
    """The weights of a stack [b, m, n], convolutions flattened."""
    return torch.stack([base.read(name).reshape(shape) for name in modules])


def _damp_stack(
    works: Sequence[LoraWork], stack: list[Pair], source: Base, target: Base, room: Room
) -> None:
    """A stack of pairs, for every LoRA, by method "damped"."""
    shape = stack[0].shape
    with _share_time(works, "read"):
        ours = _stack_weights(source, [pair.source for pair in stack], shape)
        theirs = _stack_weights(target, [pair.target for pair in stack], shape)

    with _share_time(works, "damp"):
        damper = Damper(ours.to(works[0].options.device), theirs.to(works[0].options.device))
        for work in works:  # the factors of one κ serve all
            if work.error is None:
                damper.at(work.options.kappa)
        _move_in_turn(works, stack, room, partial(_damp_updates, damper=damper))


def _project_stack(
    works: Sequence[LoraWork],
    stack: list[Pair],
    source: Base,
    target: Base,
    cache: BasisCache,
    room: Room,
) -> None:
    """A stack of pairs, for every LoRA, by a method that needs subspaces."""
    rank, device = works[0].options.rank, works[0].options.device
    modules = [pair.source for pair in stack], [pair.target for pair in stack]
    with _share_time(works, "svd"):
        ours = cache.of(source, modules[0], rank, device)
        theirs = cache.of(target, modules[1], rank, device)
    with _share_time(works, "overlap"):
        names = cache.names(source, modules[0], rank), cache.names(target, modules[1], rank)
        pairs = list(zip(*names, strict=True))
        aligned = align_bases(pairs, ours, theirs, cache.pairs(source, target))
    with _share_time(works, "project"):
        step = partial(_project_updates, source=ours, target=theirs, aligned=aligned)
        _move_in_turn(works, stack, room, step)


def _move_in_turn(
    works: Sequence[LoraWork], stack: list[Pair], room: Room, step: Callable[..., list[Moved]]
) -> None:
    """step(works, stack, places) for LoRAs that have one rank at the same places of a stack.

    It gives what became of every place of the first LoRA, then of the second, and so on. One step
    after the other: torch's own threads share a stack better than threads that share Python.
    """
    for together, places in _group_equal_ranks(
        works, stack, room.columns(matrix_shape(stack[0].shape))
    ):
        try:
            moved = step(together, stack, places)
        except LORA_FAILURES as error:
            for work in together:
                work.error = error
            continue
        for i, work in enumerate(together):
            own = moved[i * len(places) : (i + 1) * len(places)]
            try:
                work.moved += _finish_updates(own, work)
            except LORA_FAILURES as error:
                work.error = error


def _group_equal_ranks(
    works: Sequence[LoraWork], stack: list[Pair], columns: int
) -> list[tuple[list[LoraWork], list[int]]]:
    """LoRAs that have updates of equal rank at the same places of a stack, and those places.

    So many of either that their factors have at most `columns` columns, or one of both.
    """
    found: dict[tuple[int, ...], list[LoraWork]] = {}
    for work in works:
        if work.error is not None:
            continue
        own, updates = set(work.plan.pairs), work.adapter.updates
        ranks: dict[int, list[int]] = {}
        for i, pair in enumerate(stack):
            if pair in own:
                ranks.setdefault(updates[pair.source].rank, []).append(i)
        for rank, places in ranks.items():
            found.setdefault((rank, *places), []).append(work)
    groups = []
    for (rank, *places), alike in found.items():
        most = max(1, columns // max(1, rank))
        several = max(1, most // len(places))
        pieces = -(-len(places) // most)  # of equal size
        size = -(-len(places) // pieces)
        groups += [
            (alike[i : i + several], places[j : j + size])
            for i in range(0, len(alike), several)
            for j in range(0, len(places), size)
        ]
    return groups


@contextmanager
def _share_time(works: Sequence[LoraWork], stage: str) -> Iterator[None]:
    """Times what is done for several LoRAs at once, and gives each its share."""
    clock = Clock()
    with clock(stage):
        yield
    for work in works:
        seconds = work.clock.seconds
        seconds[stage] = seconds.get(stage, 0.0) + clock.seconds[stage] / len(works)


def _stack_updates(works: list[LoraWork], pairs: list[Pair]) -> LowRank:
    """The source's updates of several LoRAs, [b, l, m, r] and [b, l, r, n]."""
    updates = [work.adapter.updates[pair.source] for pair in pairs for work in works]
    device = works[0].options.device

    def stacked(factors: list[Tensor]) -> Tensor:
        stack: Tensor = torch.stack(factors).to(device).unflatten(0, (len(pairs), len(works)))
        return stack

    return LowRank(stacked([x.up for x in updates]), stacked([x.down for x in updates]))


def _copy_updates(work: LoraWork) -> list[Moved]:
    """The updates as they are."""
    adapter = work.adapter
    return [
        (
            pair,
            adapter.updates[pair.source],
            describe_unchanged(adapter, pair.source, pair.target, work.method.outcome),
        )
        for pair in work.plan.pairs
    ]


def _damp_updates(
    works: list[LoraWork], stack: list[Pair], places: list[int], damper: Damper
) -> list[Moved]:
    """The updates weakened along the drift of the weights [b, m, n]."""
    rows: list[Moved] = []
    for work in works:  # each may have a κ of its own
        delta = _stack_updates([work], [stack[i] for i in places])
        delta = LowRank(delta.up.squeeze(1), delta.down.squeeze(1))
        moved = damper.at(work.options.kappa)(delta, places)
        apart = LowRank(
            torch.cat([moved.up, -delta.up], -1), torch.cat([moved.down, delta.down], -2)
        )
        norms = zip(*(update.norm().tolist() for update in (delta, moved, apart)), strict=True)
        for i, (place, (before, after, distance)) in enumerate(zip(places, norms, strict=True)):
            pair = stack[place]
            row = describe_unchanged(
                work.adapter, pair.source, pair.target, work.method.outcome, before**2
            )
            if before > 0:
                ratio = after / before
                row = replace(
                    row,
                    surviving_energy=ratio**2,
                    norm_ratio=ratio,
                    copy_distance=distance / before,
                )
            rows.append((pair, LowRank(moved.up[i], moved.down[i]), row))
    return rows


def _project_updates(
    works: list[LoraWork],
    stack: list[Pair],
    places: list[int],
    source: Basis,
    target: Basis,
    aligned: Alignment,
) -> list[Moved]:
    """The updates through projection, recompression and the gate on Φ."""
    options, pairs = works[0].options, [stack[i] for i in places]
    source, target, aligned = source.take(places), target.take(places), aligned.take(places)
    projected = project_factors(
        _stack_updates(works, pairs), source, target, options.method, aligned.similar
    )
    info, recompressed = projected.info, projected.recompressed()
    rungs = ["+".join(sorted(set(both))) for both in zip(source.rungs, target.rungs, strict=True)]
    measured = Measures.of(info, rungs, aligned.angles_left, aligned.angles_right)
    account = [
        x.flatten().tolist()
        for x in (info.energy, info.surviving_energy, info.norm_ratio, info.copy_distance)
    ]
    rows: list[Moved] = []
    for first, work in enumerate(works):
        for i, pair in enumerate(pairs):
            at = i * len(works) + first
            energy, surviving, ratio, distance = (values[at] for values in account)
            measures, what = measured[at], work.method.outcome
            row = replace(
                describe_unchanged(work.adapter, pair.source, pair.target, what, energy),
                measures=measures,
                surviving_energy=surviving,
                norm_ratio=ratio,
                copy_distance=distance,
            )
            side = "left" if measures.phi_left <= measures.phi_right else "right"
            if min(measures.phi_left, measures.phi_right) < options.threshold:
                reason = f"Φ {side} below the threshold {options.threshold:g}"
                gated = replace(row, target=None, status="skipped", reason=reason, rank_out=0)
                rows.append((pair, None, gated))
            else:
                rows.append((pair, recompressed[at], row))
    return rows


def _finish_updates(moved: list[Moved], work: LoraWork) -> list[Moved]:
    """Updates at their strength and output rank, on the CPU, and accounted for."""
    return [(pair, *_finish_update(update, row, work)) for pair, update, row in moved]


def _finish_update(
    update: LowRank | None, row: ModuleReport, work: LoraWork
) -> tuple[LowRank | None, ModuleReport]:
    """One of them."""
    if update is None:
        return None, row
    options = work.options
    row = row.at_strength(options.factor)
    if options.factor != 1:
        update = LowRank(update.up * options.factor, update.down)
    update = update.to("cpu")
    smaller = cut_rank(update, options.out_rank, work.own_ranks.get(row.source, row.rank_in))
    if smaller is not update:
        row, update = row.cut(update, smaller), smaller
    if not (is_finite(update.up) and is_finite(update.down)):
        raise NonFiniteWeights(f"the moved update of {row.source} is not finite")
    return update, replace(row, rank_out=update.rank)
