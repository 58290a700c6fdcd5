"""Moves by the weights of two bases: decided, then done by stacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..architectures.modules import matrix_shape
from ..bases import Base
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.memory import Budget, Memory
from ..bases.vae import RUN_INSTEAD, can_fit
from ..comparison.drift import measure_affinities
from ..comparison.module_map import Match
from ..comparison.overlap import Alignment, align_bases
from ..comparison.renumbered_blocks import recognise_blocks
from ..core.affinity import Affinity
from ..core.grouped import Stack, move_stacks
from ..core.lowrank import LowRank
from ..core.merging import subtract_updates
from ..core.methods import Method
from ..core.precision import working_dtype
from ..core.projection import Projected, apply_rule, project_factors
from ..core.projectors import AnyBasis
from ..core.verdict import AUTO, STRANGE_COSINE, STRANGER, PairVerdict, judge_pairs
from ..errors import InvalidOption, UnrelatedBases
from ..reports.module_report import Measures
from ..verbs.batch import label_stage
from .ledger import Ledger
from .plan import Pair


def decide_method(
    ledger: Ledger, cache: BasisCache, memory: Memory, *, renumbered: bool = False
) -> Match | None:
    """Looks at the pairs of weights and decides how to move the LoRA.

    `renumbered` says that the names were put right already.

    Returns:
        None, or the match to plan with instead: method "auto" saw that the names pair blocks
        wrongly, and nothing is decided yet.

    Raises:
        NonFiniteWeights: NaN or Inf in a weight.
        UnrelatedBases: method "auto", and the weights have nothing in common.
        TooLittleMemory: the bound is below what one weight needs.
    """
    if named := [base.name for base in (ledger.source, ledger.target) if base.by_name]:
        _copy_by_names(ledger, named)
        return None
    pairs, options, results = ledger.plan.pairs, ledger.options, ledger.result_bytes
    shapes = {matrix_shape(pair.shape) for pair in pairs}
    memory.check(shapes, "affinity", results)
    if options.chosen.needs_bases:
        memory.check(shapes, "bases", results)
    with ledger.clock("check"):
        places = [(pair.source, pair.target) for pair in pairs]
        progress = label_stage("checking", options.progress)
        room = memory.room(results)
        affinities = measure_affinities(
            ledger.source, ledger.target, places, progress, cache, room, options.device or "cpu"
        )
    # A LoRA of text encoders alone says nothing of the two bases, and needs nothing of them.
    ledger.verdict = judge_pairs(affinities) if affinities else None
    ledger.affinities = {pair.target: a for pair, a in zip(pairs, affinities, strict=True)}
    if options.method == AUTO:
        cosines = {module: affinity.cosine for module, affinity in ledger.affinities.items()}
        by_names = not ledger.plan.decisions  # names told which block is which
        if by_names and not renumbered:
            match = recognise_blocks(options.match, ledger.source, ledger.target, cosines)
            if match is not options.match:
                return match
        _leave_out_strangers(ledger)
    ledger.asked = options.method_name
    if isinstance(options.method, str):
        name: Any = options.chosen.name
        ledger.options = replace(options, method=name)
    return None


def _copy_by_names(ledger: Ledger, named: list[str]) -> None:
    """Decides to copy every update: bases that are given by name have no weights to compare.

    Raises:
        InvalidOption: a method that needs weights.
    """
    options = ledger.options
    if options.method not in (AUTO, "copy"):
        raise InvalidOption(
            f"method {options.method_name!r} needs the weights of both models, and {named[0]} was "
            "given by its name; give the model's file or folder"
        )
    ledger.asked = options.method_name
    ledger.options = replace(options, method="copy")
    ledger.warnings += (
        f"Nothing was compared: {' and '.join(named)} {'were' if named[1:] else 'was'} given by "
        "name. The modules were renamed and numbered anew, and no number was changed.",
    )


def _leave_out_strangers(ledger: Ledger) -> None:
    """Takes the pairs out of the plan whose weights have nothing in common.

    Raises:
        UnrelatedBases: that is so of the whole bases.
    """
    verdict, source, target = ledger.verdict, ledger.source, ledger.target
    if verdict is None:
        return
    if not verdict.related:
        total = Affinity.total(ledger.affinities.values())
        for base, energy in ((source, total.source), (target, total.target)):
            if energy == 0:
                raise UnrelatedBases(_explain_zeros(base))
        raise UnrelatedBases(_explain_unrelated(verdict, source, target))
    strange = {name for name, a in ledger.affinities.items() if a.cosine < STRANGE_COSINE}
    strangers = [pair for pair in ledger.plan.pairs if pair.target in strange]
    for pair in strangers:
        ledger.enter(pair, None, STRANGER)
    related = [pair for pair in ledger.plan.pairs if pair.target not in strange]
    ledger.plan = replace(ledger.plan, pairs=related)


def _explain_unrelated(verdict: PairVerdict, source: Base, target: Base) -> str:
    fits = can_fit(source.path, target.path)
    fit = RUN_INSTEAD if fits else "`fit()` where both models can run as whole pipelines"
    return (
        "these two models have nothing in common: they were trained apart. "
        f"Next: {fit}, or train the LoRA on {target.name}; `method='copy'` would write a LoRA "
        f"that does nothing useful there (cosine of the weights {verdict.cosine:.2f})"
    )


def _explain_zeros(base: Base) -> str:
    return (
        f"{base.path or base.name}: every weight that the LoRA updates is zero, as in a "
        "placeholder or a damaged file, so there is nothing to choose a method by; give the real "
        "base model, or `method='copy'`"
    )


def move_updates(
    ledger: Ledger, cache: BasisCache, memory: Memory, progress: Progress | None
) -> None:
    """Moves every update of a LoRA, and enters the results into its ledger.

    `memory` bounds how much is worked on at a time; progress is called as progress(done, total,
    target module).
    """
    updates, pairs, method = ledger.adapter.updates, ledger.plan.pairs, ledger.options.chosen
    if not method.needs_bases:
        for i, pair in enumerate(pairs):
            if method.rule is None:
                ledger.enter(pair, updates[pair.source], method.outcome)
                continue
            _apply_rule(ledger, pair, method)
            if progress:
                progress(i + 1, len(pairs), pair.target)
        return
    room = memory.room(ledger.result_bytes)

    def report(done: int, pair: Pair) -> None:
        if progress:
            progress(done, len(pairs), pair.target)

    move = partial(_project_updates, ledger, cache)
    move_stacks(_find_stacks(ledger, cache, room), move, report)


def _find_stacks(ledger: Ledger, cache: BasisCache, room: Budget) -> Iterator[Stack[Pair]]:
    """Yields the pairs in stacks of one shape, with bases that are cached, read or computed."""
    source, target, rank = ledger.source, ledger.target, ledger.options.rank
    stacks = []
    for shape, alike in ledger.plan.groups().items():
        size = room.stack(matrix_shape(shape), "bases")
        stacks += [alike[i : i + size] for i in range(0, len(alike), size)]
    on_cpu = torch.device(ledger.options.device or "cpu").type == "cpu"
    requests = (
        partial(cache.look_up, base, modules, rank, on_cpu)
        for stack in stacks
        for base, modules in (
            (source, [pair.source for pair in stack]),
            (target, [pair.target for pair in stack]),
        )
    )
    bases = cache.prefetch(requests, rank, ledger.options.device)
    for stack in stacks:
        updates = [ledger.adapter.updates[pair.source] for pair in stack]
        columns = room.columns(matrix_shape(stack[0].shape))
        with ledger.clock("svd"):
            ready = Stack(stack, updates, next(bases), next(bases), columns)
        yield ready
        del ready  # before the next one is computed


def _apply_rule(ledger: Ledger, pair: Pair, method: Method) -> None:
    """Moves an update by a rule, which gets both weights as float matrices."""
    update, where = ledger.adapter.updates[pair.source], ledger.options.device or "cpu"
    weights = ledger.source.read(pair.source), ledger.target.read(pair.target)
    matrices = (w.to(where, working_dtype(w.dtype)).reshape(pair.shape) for w in weights)
    try:
        moved = apply_rule(method, update.to(where), *matrices).to("cpu")
    except Exception as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"{method.name} was moving {pair.source} to {pair.target}")
        raise
    norm = float(update.norm())
    ledger.enter(
        pair,
        moved,
        method.outcome,
        norm_ratio=float(moved.norm()) / norm if norm else 1.0,
        copy_distance=float(subtract_updates(moved, update).norm()) / norm if norm else 0.0,
    )


def _project_updates(
    ledger: Ledger,
    cache: BasisCache,
    pairs: list[Pair],
    updates: Tensor | LowRank,
    source: AnyBasis,
    target: AnyBasis,
) -> None:
    """Projects updates of one rank; skips pairs whose weights overlap less than the threshold.

    `updates` [b, m, n] and the bases are in the order of `pairs`.
    """
    assert isinstance(updates, LowRank)
    options = ledger.options
    with ledger.clock("overlap"):
        origins = cache.names(ledger.source, [pair.source for pair in pairs], options.rank)
        ends = cache.names(ledger.target, [pair.target for pair in pairs], options.rank)
        names = list(zip(origins, ends, strict=True))
        table = cache.pairs(ledger.source, ledger.target)
        aligned = align_bases(names, source, target, table)
    with ledger.clock("project"):
        if options.device:
            updates = updates.to(options.device)
        projected = project_factors(updates, source, target, options.chosen, aligned.similar)
        _enter_projected(ledger, pairs, projected, aligned, (source, target))


def _enter_projected(
    ledger: Ledger,
    pairs: list[Pair],
    projected: Projected,
    aligned: Alignment,
    bases: tuple[AnyBasis, AnyBasis],
) -> None:
    """Enters projected updates and their measures into the ledger."""
    options = ledger.options
    info, recompressed = projected.info, projected.recompressed()
    solvers = [
        "+".join(sorted(set(both))) for both in zip(*(x.solvers for x in bases), strict=True)
    ]
    measured = Measures.of(info, solvers, aligned.angles_left, aligned.angles_right)
    numbers = info.energy, info.norm_ratio, info.copy_distance
    lists = (x.flatten().tolist() for x in numbers)
    for pair, update, measures, energy, ratio, distance in zip(
        pairs, recompressed, measured, *lists, strict=True
    ):
        low = min(measures.phi_left, measures.phi_right) < options.threshold
        side = "left" if measures.phi_left <= measures.phi_right else "right"
        why = f"Φ {side} below the threshold {options.threshold:g}"
        ledger.enter(
            pair,
            None if low else update,
            why if low else ledger.options.chosen.outcome,
            energy=energy,
            norm_ratio=ratio,
            copy_distance=distance,
            measures=measures,
        )
