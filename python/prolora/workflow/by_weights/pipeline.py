"""The stages of a transfer by weights: read and plan, look at the weights, move, assemble."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from ... import adapters
from ...adapters.adapter import Adapter
from ...adapters.formats.moves import read_provenance
from ...bases import Base
from ...bases.cache.basis_cache import BasisCache, CacheLike
from ...bases.memory import Memory
from ...comparison.block_matching import resolve_match
from ...comparison.verdict import STRANGER
from ...comparison.width_selection import WidthFinder
from ...core.lowrank import LowRank
from ...core.methods import Needs
from ..base_check import check_bases
from ..module_report import ModuleReport
from ..options import LoraLike, TransferOptions
from ..plan import ModulePlan, Route, find_own_ranks, make_plan, sum_dropped_blocks
from ..report import Report
from .assembly import (
    assemble_adapter,
    build_metadata,
    build_report,
    check_coverage,
    check_planned_coverage,
    describe_passed_module,
    describe_summed_module,
    describe_unchanged,
    hollow_update,
    list_summed_modules,
    list_unplaced_modules,
    outline_result,
)
from .decision import decide_method
from .file_budget import OutputForm
from .job import Job, label_stage
from .lora_work import Clock, LoraWork
from .move_updates import move_all
from .slicing import describe_sliced_module, measure_sliced, slice_adapter, slice_source
from .vectors import carry_vectors

Notes = Callable[[BasisCache], Mapping[str, str]]
"""What the header of a result says of its making. It is computed when nothing can be refused any
more, as it may read all bytes of the bases."""


@dataclass(frozen=True)
class Result:
    """What a pipeline gives.

    Attributes:
        adapter: of the target.
        report: what was kept and lost.
        route: of the LoRA, the method decided.
    """

    adapter: Adapter
    report: Report
    route: Route


def transfer_by_weights(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: TransferOptions,
    notes: Notes | None = None,
) -> Result:
    """Moves one LoRA: the stages, one after the other.

    Raises:
        ProLoRAError: see `prolora.transfer`.
    """
    with BasisCache(options.cache).saving() as cache:
        job, source = _move_job(lora, source, target, options, cache)
        return finish_job(job, source, target, cache, notes)


def move_without_header(
    lora: LoraLike, source: Base, target: Base, options: TransferOptions
) -> Result:
    """`transfer_by_weights` of what may never be written: no base is hashed for its header.

    Raises:
        ProLoRAError: see `prolora.transfer`.
    """
    with BasisCache(options.cache).saving() as cache:
        job, source = _move_job(lora, source, target, options, cache)
        return finish_job(job, source, target, None)


def _move_job(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: TransferOptions,
    cache: BasisCache,
) -> tuple[Job, Base]:
    """All stages but the last, and the source as the target's widths cut it."""
    memory = Memory(options.memory_limit, options.rank, options.device)
    job = prepare_job(lora, source, target, options, cache)
    source = slice_source(source, [job.plan])
    job = decide_method(job, source, target, cache, memory, job.work.result_bytes())
    move_all([job.work], source, target, cache, memory, options.progress)
    return job, source


def prepare_job(
    lora: LoraLike,
    source: Base,
    target: Base,
    asked: TransferOptions,
    cache: BasisCache,
    widths: WidthFinder | None = None,
) -> Job:
    """Reads and plans; refuses all that can be refused without looking at weights.

    Args:
        lora: what is moved.
        source: the base that it was trained on.
        target: the base that it moves to.
        asked: the options.
        cache: what is known of the weights.
        widths: what is known of a narrower target; None starts anew.
    """
    clock, whole_source = Clock(), source
    with clock("read"):
        check_bases(lora, source, target, asked, cache)
        adapter = read_lora(lora, source)
    with clock("match"):
        plan = plan_transfer(adapter, source, target, asked, cache, widths)
    whole = measure_sliced(adapter, plan)
    adapter, source = slice_adapter(adapter, plan), slice_source(source, [plan])
    summed = sum_dropped_blocks(adapter, plan)
    check_planned_coverage(adapter, summed, plan, asked.min_coverage)
    if (output := OutputForm.of(asked)) != OutputForm():
        output.check(outline_result(summed, Route(adapter, plan, source, target, asked)))
    used = {pair.source for pair in plan.pairs}
    moved = replace(summed, updates={n: x for n, x in summed.updates.items() if n in used})
    # Modules without a place are measured now, so that their factors need no memory later.
    unplaced = {name: adapter.updates[name] for name in (*plan.skipped, *plan.refused)}
    energies = {name: update.norm().square().item() for name, update in unplaced.items()} | whole
    updates = {n: hollow_update(x) if n in unplaced else x for n, x in adapter.updates.items()}
    adapter = replace(adapter, updates=updates)
    work = LoraWork(moved, plan, asked, clock, own_ranks=find_own_ranks(adapter, plan))

    def prepare(options: TransferOptions) -> Job:
        return prepare_job(lora, whole_source, target, options, cache, widths)

    return Job(adapter, plan, asked, work, energies, prepare)


def read_lora(lora: LoraLike, source: Base) -> Adapter:
    """The LoRA; some kinds (DoRA, OFT, GLoRA) are an update only together with their base."""
    if isinstance(lora, Adapter):
        return lora
    names = adapters.BaseNames(source.family, source.shapes)
    return adapters.read_adapter(lora, read_weight=source.read, base=names)


def plan_transfer(
    adapter: Adapter,
    source: Base,
    target: Base,
    options: TransferOptions,
    cache: CacheLike,
    widths: WidthFinder | None = None,
) -> ModulePlan:
    """Where every module goes.

    Weights are read only to match blocks by similarity, and where the target is narrower.
    """
    match = resolve_match(
        options.match,
        source,
        target,
        cache=cache,
        device=options.device,
        max_memory=options.max_memory,
        progress=label_stage("matching", options.progress),
    )
    widths = widths or WidthFinder(
        source, target, options.device, label_stage("comparing", options.progress)
    )
    return make_plan(adapter, source, target, match, options.text_encoder, options.dropped, widths)


def finish_job(
    job: Job, source: Base, target: Base, cache: BasisCache | None, notes: Notes | None = None
) -> Result:
    """The adapter of the target, and the report, of what was moved.

    Args:
        job: what was moved.
        source: the base that it was trained on.
        target: the base that it moves to.
        cache: remembers the hashes of the bases; None leaves the LoRA its own header, and no base
            is hashed.
        notes: what else the header says.

    Raises:
        LowCoverage: fewer modules moved than was asked for.
        ProLoRAError: what stopped the move.
    """
    adapter, plan, work = job.adapter, job.plan, job.work
    if work.error:
        raise work.error
    updates, rows = _collect_results(job)
    check_coverage(rows, job.asked.min_coverage, work.options.threshold)
    route = Route(adapter, plan, source, target, work.options)
    vectors = carry_vectors(route, updates)
    metadata, provenance = dict(adapter.metadata), {}
    if cache is not None:
        with work.clock("hash"):
            metadata = build_metadata(route, cache)
            metadata |= prefix_notes(notes(cache)) if notes else {}
            provenance = read_provenance(metadata)
    moved = assemble_adapter(adapter, updates, vectors, target, metadata)
    with work.clock("fit"):
        fitted = OutputForm.of(job.asked).fit(moved, rows)
    report = build_report(
        route,
        fitted.rows,
        vectors,
        asked=job.asked.method,
        verdict=job.verdict,
        damping=work.options.kappa if work.method.needs is Needs.WEIGHTS else None,
        file_limit=fitted.limit,
        seconds=work.clock.seconds,
        provenance=provenance,
    )
    return Result(fitted.adapter, report, route)


def _collect_results(job: Job) -> tuple[dict[str, LowRank], list[ModuleReport]]:
    """Target module -> update, and a row for every module of the LoRA."""
    adapter, plan = job.adapter, job.plan
    updates: dict[str, LowRank] = {}
    rows = list_unplaced_modules(adapter, plan, job.energies)
    for pair, update, row in job.work.moved:
        row, affinity = describe_summed_module(row, adapter, plan), job.affinities[pair.target]
        row = describe_sliced_module(row, plan, job.energies)
        rows.append(replace(row, drift=affinity.drift, cosine=affinity.cosine))
        if update is not None:
            updates[pair.target] = update
    for pair in job.strangers:
        affinity = job.affinities[pair.target]
        row = describe_unchanged(job.work.adapter, pair.source, None, STRANGER)
        row = describe_summed_module(row, adapter, plan)
        row = replace(row, status="skipped", rank_out=0, cosine=affinity.cosine)
        rows.append(replace(describe_sliced_module(row, plan, job.energies), drift=affinity.drift))
    for name in plan.passed:
        updates[name] = adapter.updates[name]
        rows.append(describe_passed_module(adapter, name))
    moved = {pair.source: pair.target for pair in plan.pairs if pair.target in updates}
    return updates, rows + list_summed_modules(adapter, plan, moved)


def prefix_notes(notes: Mapping[str, str]) -> dict[str, str]:
    """Notes on how a file was made, under the names that they have in its header."""
    return {f"prolora.{key}": text for key, text in notes.items()}


def list_inputs(lora: LoraLike, source: Base, target: Base) -> list[Path]:
    """The files and folders that a transfer reads."""
    files = [Path(lora)] if isinstance(lora, str | PathLike) else []
    return [*files, *source.files, *target.files]
