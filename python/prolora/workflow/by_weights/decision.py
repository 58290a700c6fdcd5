"""How a LoRA is moved, and which of its modules: decided by the weights of the two bases."""

from __future__ import annotations

from dataclasses import replace

from ...architectures.modules import matrix_shape
from ...bases import Base
from ...bases.cache.basis_cache import BasisCache
from ...bases.memory import Memory
from ...bases.vae import can_probe
from ...comparison.drift import Affinity, measure_affinities
from ...comparison.renumbered_blocks import recognise_blocks
from ...comparison.verdict import STRANGE_COSINE, Verdict, judge_pairs
from ...errors import UnrelatedBases
from .job import Job, label_stage


def decide_method(
    job: Job, source: Base, target: Base, cache: BasisCache, memory: Memory, results: int
) -> Job:
    """Looks at the pairs of weights and decides how to move the LoRA.

    Args:
        job: the LoRA.
        source: the base that it was trained on.
        target: the base that it moves to.
        cache: what is known of their weights.
        memory: the bound.
        results: bytes that this LoRA and those before it will take.

    Returns:
        The job; another one where method "auto" saw that the names pair blocks wrongly.

    Raises:
        NonFiniteWeights: NaN or Inf in a weight.
        UnrelatedBases: method "auto", and the weights have nothing in common.
        TooLittleMemory: the bound is below what one weight needs.
    """
    _measure_pairs(job, source, target, cache, memory, results)
    if job.asked.chosen is None:
        cosines = {module: affinity.cosine for module, affinity in job.affinities.items()}
        by_names = not job.plan.decisions  # names told which block is which
        match = job.asked.match
        if by_names:
            match = recognise_blocks(match, source, target, cosines)
        if match is not job.asked.match:
            job = job.prepare(replace(job.asked, match=match))
            _measure_pairs(job, source, target, cache, memory, results)
        _leave_out_strangers(job, source, target)
    job.work.options = job.asked.decide(job.verdict)
    shapes = {matrix_shape(pair.shape) for pair in job.plan.pairs}
    memory.check(shapes, job.work.method.needs, results)
    return job


def _measure_pairs(
    job: Job, source: Base, target: Base, cache: BasisCache, memory: Memory, results: int
) -> None:
    """Gives the job its affinities and its verdict; see `decide_method`."""
    pairs, asked = job.plan.pairs, job.asked
    shapes = {matrix_shape(pair.shape) for pair in pairs}
    memory.check(shapes, "affinity", results)
    if asked.chosen is not None:
        memory.check(shapes, asked.chosen.needs, results)
    with job.work.clock("check"):
        places = [(pair.source, pair.target) for pair in pairs]
        progress = label_stage("checking", asked.progress)
        room = memory.room(results)
        affinities = measure_affinities(source, target, places, progress, cache, room)
    # A LoRA of text encoders alone says nothing of the two bases, and needs nothing of them.
    job.verdict = judge_pairs(affinities) if affinities else None
    job.affinities = {pair.target: a for pair, a in zip(pairs, affinities, strict=True)}


def _leave_out_strangers(job: Job, source: Base, target: Base) -> None:
    """Takes the pairs out of the plan whose weights have nothing in common.

    Raises:
        UnrelatedBases: that is so of the whole bases.
    """
    if job.verdict is None:
        return
    if not job.verdict.related:
        total = Affinity.total(job.affinities.values())
        for base, energy in ((source, total.source), (target, total.target)):
            if energy == 0:
                raise UnrelatedBases(_explain_zeros(base))
        raise UnrelatedBases(_explain_unrelated(job.verdict, source, target))
    strange = {name for name, a in job.affinities.items() if a.cosine < STRANGE_COSINE}
    job.strangers = [pair for pair in job.plan.pairs if pair.target in strange]
    job.plan.pairs = [pair for pair in job.plan.pairs if pair.target not in strange]


def _explain_unrelated(verdict: Verdict, source: Base, target: Base) -> str:
    """Why `auto` writes nothing, and what may work instead."""
    way = " `method='copy'` does it anyway"
    if can_probe(source.path, target.path):
        way = f" `method='probe'` looks at the running models and may move it;{way}"
    return f"{verdict.sentence()} Nothing written;{way}"


def _explain_zeros(base: Base) -> str:
    """Why `auto` writes nothing between bases without values."""
    return (
        f"{base.path or base.name}: every weight that the LoRA updates is zero, as in a "
        "placeholder or a damaged file, so there is nothing to choose a method by; give the real "
        "base model, or `method='copy'`"
    )
