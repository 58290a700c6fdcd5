"""How a LoRA is moved, and which of its modules: decided by the weights of the two bases."""

from __future__ import annotations

from dataclasses import replace

from ..architectures.modules import matrix_shape
from ..bases import Base
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.memory import Memory
from ..bases.vae import RUN_INSTEAD, can_fit
from ..comparison.drift import measure_affinities
from ..comparison.module_map import Match
from ..comparison.renumbered_blocks import recognise_blocks
from ..core.affinity import Affinity
from ..core.verdict import AUTO, STRANGE_COSINE, STRANGER, Verdict, judge_pairs
from ..errors import UnrelatedBases
from .ledger import Ledger, Moved


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
    _measure_pairs(ledger, cache, memory)
    options = ledger.options
    if options.method == AUTO:
        cosines = {module: affinity.cosine for module, affinity in ledger.affinities.items()}
        by_names = not ledger.plan.decisions  # names told which block is which
        if by_names and not renumbered:
            match = recognise_blocks(options.match, ledger.source, ledger.target, cosines)
            if match is not options.match:
                return match
        _leave_out_strangers(ledger)
    ledger.asked, ledger.options = options.method, replace(options, method=options.chosen.name)
    return None


def _measure_pairs(ledger: Ledger, cache: BasisCache, memory: Memory) -> None:
    """Notes the affinities and the verdict; see `decide_method`."""
    pairs, options, results = ledger.plan.pairs, ledger.options, ledger.result_bytes
    shapes = {matrix_shape(pair.shape) for pair in pairs}
    memory.check(shapes, "affinity", results)
    if options.chosen.needs_bases:
        memory.check(shapes, "bases", results)
    with ledger.clock("check"):
        places = [(pair.source, pair.target) for pair in pairs]
        progress = label_stage("checking", options.progress)
        room = memory.room(results)
        affinities = measure_affinities(ledger.source, ledger.target, places, progress, cache, room)
    # A LoRA of text encoders alone says nothing of the two bases, and needs nothing of them.
    ledger.verdict = judge_pairs(affinities) if affinities else None
    ledger.affinities = {pair.target: a for pair, a in zip(pairs, affinities, strict=True)}


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
        ledger.enter(Moved(pair, None, STRANGER))
    ledger.leave_out(strangers)


def label_stage(what: str, progress: Progress | None) -> Progress | None:
    """Wraps the caller's callback, so that each name begins with the stage."""
    if progress is None:
        return None
    return lambda done, total, name: progress(done, total, f"{what} {name}")


def _explain_unrelated(verdict: Verdict, source: Base, target: Base) -> str:
    """Explains why `auto` writes nothing, and what may work instead."""
    fits = can_fit(source.path, target.path)
    fit = RUN_INSTEAD if fits else "`fit()` where both models can run as whole pipelines"
    return (
        "these two models have nothing in common: they were trained apart. Nothing was written. "
        f"Next: {fit}, or train the LoRA on {target.name}; `method='copy'` would write a LoRA "
        f"that does nothing useful there (cosine of the weights {verdict.cosine:.2f})"
    )


def _explain_zeros(base: Base) -> str:
    """Explains why `auto` writes nothing between bases without values."""
    return (
        f"{base.path or base.name}: every weight that the LoRA updates is zero, as in a "
        "placeholder or a damaged file, so there is nothing to choose a method by; give the real "
        "base model, or `method='copy'`"
    )
