"""The main job: read, pair, project by shape group, write, verify."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import adapters
from ..adapters.adapter import Adapter
from ..adapters.unread import PEFT_WEIGHTS
from ..architectures.modules import matrix_shape
from ..bases import Base, open_base
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.memory import Memory
from ..bases.vae import can_probe
from ..comparison.block_matching import resolve_match
from ..comparison.drift import Affinity, measure_affinities
from ..comparison.verdict import AUTO, judge_affinity
from ..core.lowrank import LowRank
from ..errors import LowCoverage, ProLoRAError, UnrelatedBases
from ..files.writing import check_writable
from . import probe_transfer
from .assembly import (
    assemble_adapter,
    blank_report,
    build_metadata,
    check_coverage,
    describe_summed_module,
    explain_low_coverage,
    hollow_update,
    list_summed_modules,
    outline_result,
    place_vectors_of,
)
from .file_budget import OutputForm
from .move_updates import Clock, LoraWork, describe_unchanged, move_all, weights_needed
from .options import PROBE, Options
from .plan import Plan, make_plan, sum_dropped_blocks
from .report import Report
from .resume import make_recipe


@dataclass(frozen=True)
class Transfer:
    """A finished transfer, in memory.

    Attributes:
        adapter: the LoRA of the target.
        report: what was kept and lost.
    """

    adapter: Adapter
    report: Report
    inputs: list[Path] = field(default_factory=list, repr=False)

    def save(
        self,
        path: str | PathLike[str],
        *,
        format: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes the LoRA: to a temporary file, read back and compared, then renamed.

        Args:
            path: a .safetensors file, or a folder for `format="peft"`.
            format: "auto" (as it came in), "kohya", "diffusers", "peft" or "comfy".
            dtype: of the factors; None means as they came in.

        Raises:
            OutputError: the path cannot be written, or is one of the inputs.
            NonFiniteWeights: a factor overflows in dtype.
        """
        check_output(path, self.inputs)
        adapters.write_adapter(self.adapter, path, format=format, dtype=dtype)


def transfer(
    lora: str | PathLike[str] | Mapping[str, Tensor] | Adapter,
    source: Any,
    target: Any,
    *,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Transfer:
    """Turns a LoRA of one base model into the LoRA of another, without training and without data.

    Args:
        lora: a .safetensors file, a PEFT folder, a state dict or an Adapter.
        source: the base it was trained on: file, folder, mapping, nn.Module or opened Base.
        target: the base it shall move to, likewise.
        format: one the result must fit, as `Transfer.save` takes it; None asks for none.
        dtype: of the file, likewise; where out_rank is a size, it is one in this format and dtype.
        **options: see `options.Options`.

    Raises:
        UnsupportedFormat: a file, key or adapter type that cannot be read exactly, or a result that
            `format` cannot hold.
        ShapeMismatch: an update or a pair of weights that does not fit.
        NonFiniteWeights: NaN or Inf, named. All of these before any SVD runs.
        OutputError: out_rank is a size that one column a module exceeds.
        UnrelatedBases: method "auto", and the weights have nothing in common; method "probe", and
            the held-out probes speak against it.
        LowCoverage: fewer modules moved than `min_coverage` asks for.
    """
    chosen = Options(**options)
    output = OutputForm.of(chosen, format, dtype)
    return _transfer_opened(lora, open_base(source), open_base(target), chosen, output, {})


def _transfer_opened(
    lora: Any,
    source: Base,
    target: Base,
    chosen: Options,
    output: OutputForm,
    notes: Mapping[str, str],
) -> Transfer:
    """The stages of a transfer, one after the other; `notes` go into the result's header."""
    if chosen.method == PROBE:
        return _transfer_by_probing(lora, source, target, chosen, output.format, notes)
    memory = Memory(chosen.max_memory, rank=chosen.rank)
    with BasisCache(chosen.cache).saving() as cache:
        job = prepare_job(lora, source, target, chosen, output)
        memory.reserved = job.work.result_bytes()
        decide_method(job, source, target, cache, memory)
        memory.begin()
        move_all([job.work], source, target, cache, memory, chosen.progress)
        return finish_job(job, source, target, cache, notes)


@dataclass
class Job:
    """One LoRA on its way, between the stages of a transfer.

    Attributes:
        lora: what was given.
        adapter: what was read of it.
        plan: where it goes.
        asked: the options, before anything was decided.
        output: what the result is to be written as.
        work: what is moved, and what has been.
        energies: ‖ΔW_s‖² of the modules without a place.
        affinities: of the pairs of the plan.
        report: what is known so far.
    """

    lora: Any
    adapter: Adapter
    plan: Plan
    asked: Options
    output: OutputForm
    work: LoraWork
    energies: dict[str, float]
    affinities: dict[str, Affinity] = field(default_factory=dict)
    report: Report = field(default=None)  # type: ignore[assignment]


def prepare_job(lora: Any, source: Base, target: Base, asked: Options, output: OutputForm) -> Job:
    """Reads and plans; all that can be refused without looking at weights is refused here."""
    clock = Clock()
    with clock("read"):
        adapter = _read_lora(lora, source)
    with clock("match"):
        plan = plan_transfer(adapter, source, target, asked)
    check_coverage(adapter, plan, asked.min_coverage)
    whole = sum_dropped_blocks(adapter, plan)
    if output != OutputForm():
        output.check(outline_result(whole, plan, source, target, asked))
    used = {pair.source for pair in plan.pairs}
    whole = replace(whole, updates={n: x for n, x in whole.updates.items() if n in used})
    # What has no place is accounted for now, and its numbers are in nobody's way.
    left = {name: adapter.updates[name] for name in (*plan.skipped, *plan.refused)}
    energies = {name: update.norm().square().item() for name, update in left.items()}
    updates = {n: hollow_update(x) if n in left else x for n, x in adapter.updates.items()}
    adapter = replace(adapter, updates=updates)
    return Job(lora, adapter, plan, asked, output, LoraWork(whole, plan, asked, clock), energies)


def decide_method(job: Job, source: Base, target: Base, cache: BasisCache, memory: Memory) -> None:
    """Looks at the pairs of weights and decides how to move the LoRA.

    Raises:
        NonFiniteWeights: NaN or Inf in a weight.
        UnrelatedBases: method "auto", and the weights have nothing in common.
        TooLittleMemory: the bound is below what one weight needs.
    """
    adapter, plan, asked = job.adapter, job.plan, job.asked
    shapes = {matrix_shape(pair.shape) for pair in plan.pairs}
    memory.check(shapes, "affinity")
    if asked.method != AUTO:
        memory.check(shapes, weights_needed(asked))
    with job.work.clock("check"):
        places = [(pair.source, pair.target) for pair in plan.pairs]
        doing = _label_stage("checking", asked.progress)
        affinities = measure_affinities(source, target, places, doing, cache, memory)
    # A LoRA of text encoders alone says nothing of the two bases, and needs nothing of them.
    verdict = judge_affinity(Affinity.total(affinities)) if affinities else None
    if asked.method == AUTO and verdict and not verdict.related:
        way = " --method copy does it anyway"
        if can_probe(source.path, target.path):
            way = f" --method probe looks at the running models and may move it;{way}"
        raise UnrelatedBases(f"{verdict.sentence()} Nothing written;{way}")
    decided = asked.decide(verdict)
    memory.check(shapes, weights_needed(decided))
    report = blank_report(adapter, plan, source, target, decided, job.energies)
    report.asked, report.verdict = asked.method, verdict
    report.damping = decided.kappa if decided.method == "damped" else None
    job.report = report
    job.affinities = {pair.target: a for pair, a in zip(plan.pairs, affinities, strict=True)}
    job.work.options = decided


def finish_job(
    job: Job, source: Base, target: Base, cache: BasisCache, notes: Mapping[str, str]
) -> Transfer:
    """Makes the adapter of the target, and the report, of what was moved.

    Raises:
        LowCoverage: fewer modules moved than was asked for.
        ProLoRAError: what stopped the move.
    """
    adapter, plan, report, work = job.adapter, job.plan, job.report, job.work
    if work.error:
        raise work.error
    updates: dict[str, LowRank] = {}
    for pair, update, row in work.moved:
        own, seen = describe_summed_module(row, adapter, plan), job.affinities[pair.target]
        report.modules.append(replace(own, drift=seen.drift, cosine=seen.cosine))
        if update is not None:
            updates[pair.target] = update
    for name in plan.passed:
        updates[name] = adapter.updates[name]
        report.modules.append(describe_unchanged(adapter, name, name, "text encoder, carried over"))
    report.modules += list_summed_modules(
        adapter, plan, {pair.source: pair.target for pair in plan.pairs if pair.target in updates}
    )
    report.seconds = work.clock.seconds
    if report.coverage < job.asked.min_coverage:
        raise LowCoverage(explain_low_coverage(report, job.asked.min_coverage))
    vectors = place_vectors_of(adapter, plan, source, target, work.options, updates)
    report.vectors, report.left_out = len(vectors.vectors), report.left_out | vectors.left_out
    with work.clock("hash"):
        metadata = build_metadata(adapter, plan, source, target, work.options, cache)
    metadata |= {f"prolora.{key}": text for key, text in notes.items()}
    with work.clock("fit"):
        moved = job.output.fit(
            assemble_adapter(adapter, updates, vectors, target, metadata), report
        )
    files = [Path(job.lora)] if isinstance(job.lora, str | PathLike) else []
    return Transfer(moved, report, [*files, *source.files, *target.files])


def _transfer_by_probing(
    lora: Any,
    source: Base,
    target: Base,
    options: Options,
    format: str | None,
    notes: Mapping[str, str],
) -> Transfer:
    """Method "probe": all that can be refused is refused before a model is loaded."""
    probe_transfer.check_probing(source, target, options)
    adapter = _read_lora(lora, source)
    plan = probe_transfer.plan_probing(adapter, source, target, options)
    outline = probe_transfer.outline_fit(adapter, plan, source, target)
    blank = replace(adapter, updates=outline, kernels={}, vectors={})
    adapters.check_format(blank, "auto" if format is None else format)
    report = probe_transfer.build_probe_report(
        probe_transfer.outline_probing(adapter, source, target, options), source, target, options
    )
    if report.coverage < options.min_coverage:
        raise LowCoverage(explain_low_coverage(report, options.min_coverage))
    files = [Path(lora)] if isinstance(lora, str | PathLike) else []
    files += [*source.files, *target.files]
    rival = _transfer_by_weights(adapter, source, target, options, format)
    without = rival.adapter.updates if rival else {}
    done = probe_transfer.run_probing(adapter, source, target, plan, options, without)
    if rival and done.rival_serves:
        return Transfer(
            *probe_transfer.scale_transfer(rival.adapter, rival.report, done, notes), files
        )
    report = probe_transfer.build_probe_report(done, source, target, options)
    report.left_out |= adapter.left_out
    metadata = build_metadata(
        adapter, plan, source, target, replace(options, strength=done.strength)
    )
    moved = replace(
        blank,
        updates=done.updates,
        kernels=probe_transfer.kernel_sizes(done.updates, target),
        metadata=metadata | done.facts | probe_transfer.prefix_notes(notes),
    )
    return Transfer(moved, report, files)


def _transfer_by_weights(
    adapter: Adapter, source: Base, target: Base, options: Options, format: str | None
) -> Transfer | None:
    """What `auto` makes of the LoRA, a copy where it refuses; None where shapes differ."""
    for method in (AUTO, "copy"):
        try:
            chosen = replace(options, method=method, progress=None)
            return transfer(adapter, source, target, format=format, **vars(chosen))
        except UnrelatedBases:
            continue
        except ProLoRAError:
            return None
    return None


def transfer_file(
    lora: str | PathLike[str],
    source: Any,
    target: Any,
    out: str | PathLike[str],
    *,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Report:
    """File to file: `transfer`, then `Transfer.save`; the output path is checked before any work.

    Raises:
        OutputError: out cannot be written, or is an input. Also everything `transfer` raises.
    """
    source, target = open_base(source), open_base(target)
    check_output(out, [Path(lora), *source.files, *target.files])
    chosen = Options(**options)
    with BasisCache(chosen.cache).saving() as cache:
        notes = make_recipe(Path(lora), source, target, chosen, format, dtype, cache)
    done = _transfer_opened(
        lora, source, target, chosen, OutputForm.of(chosen, format, dtype), notes
    )
    progress = chosen.progress
    if progress:
        moved = len(done.adapter.updates)
        progress(moved, moved, f"writing {Path(out).name}")
    started = time.perf_counter()
    done.save(out, format=format, dtype=dtype)
    done.report.seconds["write"] = time.perf_counter() - started
    return done.report


def _read_lora(lora: Any, source: Base) -> Adapter:
    """The LoRA; some kinds (DoRA, OFT, GLoRA) are an update only together with their base."""
    return (
        lora if isinstance(lora, Adapter) else adapters.read_adapter(lora, read_weight=source.read)
    )


def plan_transfer(adapter: Adapter, source: Base, target: Base, options: Options) -> Plan:
    """Where every module goes; weights are read only to match blocks by similarity."""
    match = resolve_match(
        options.match,
        source,
        target,
        cache=options.cache,
        device=options.device,
        progress=_label_stage("matching", options.progress),
    )
    return make_plan(adapter, source, target, match, options.text_encoder, options.dropped)


def check_output(path: str | PathLike[str], inputs: list[Path]) -> None:
    """Refuses an output that cannot be written, or that is an input; a PEFT folder may exist."""
    folder = Path(path)
    check_writable(folder / PEFT_WEIGHTS if folder.is_dir() else folder, inputs)


def _label_stage(what: str, progress: Progress | None) -> Progress | None:
    """The caller's callback, told what is done to weights that are not yet moved."""
    if progress is None:
        return None
    return lambda done, total, name: progress(done, total, f"{what} {name}")
