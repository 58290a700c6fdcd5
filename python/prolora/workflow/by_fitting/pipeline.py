"""The stages of a fit: refuse, open two pipelines, run and fit them, assemble."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ... import adapters
from ...adapters.adapter import Adapter
from ...adapters.formats.moves import read_provenance
from ...adapters.training_words import read_training_words
from ...architectures.modules import is_in_text_encoder
from ...bases import Base, vae
from ...bases.cache.basis_cache import BasisCache
from ...bases.memory import resident_bytes
from ...bases.pipeline_identity import describe_pipeline_folder
from ...core.lowrank import LowRank
from ...errors import ProLoRAError, ShapeMismatch, TooLittleMemory, UnrelatedBases
from ...files.sizes import format_size
from ...probe.default_prompts import derive_prompts
from ...probe.fitting.start import NO_COPY
from ...probe.gate import COPY
from ...probe.report import ProbeReport
from ...probe.settings import FitSettings
from ..base_check import check_bases
from ..by_weights.assembly import build_metadata
from ..by_weights.base_pair import (
    BasePair,
    Depth,
    MakeNotes,
    list_inputs,
    prefix_notes,
    read_lora,
)
from ..by_weights.ledger import Ledger
from ..by_weights.rows import check_coverage, list_missed, list_tensors_left_out
from ..fit_options import FitOptions
from ..module_report import ModuleReport
from ..options import FIT, LoraLike, MethodChoice
from ..plan import ModulePlan
from ..report import Report
from ..result import Transfer
from .plan import check_fittable, outline_fit, plan_modules
from .rows import build_fit_report, list_modules, list_vectors, outline_report

if TYPE_CHECKING:
    from ...probe.checkpoint import Checkpoints, Inputs
    from ...probe.pipelines import Pipeline
    from ...probe.run import ProbeTransfer

_OF_TRANSFERS = ("rank_rule", "threshold")
"""What the header says of a LoRA that was moved by weights, and not of one that was fitted."""


@dataclass(frozen=True)
class FitJob:
    """A LoRA on its way from one pipeline to another.

    Attributes:
        adapter: the LoRA of the source.
        plan: which of its modules are carried over or skipped; all others are fitted.
        source: the base it was trained on.
        target: the base it goes to.
        options: as they were asked for.
    """

    adapter: Adapter
    plan: ModulePlan
    source: Base
    target: Base
    options: FitOptions


def fit_to_pipelines(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: FitOptions,
    notes: MakeNotes | None = None,
) -> Transfer:
    """Fits a LoRA to the running models; refuses all that it can before a model is loaded.

    What moving by weights alone makes of the LoRA is its rival: where that does no worse on
    held-out probes, it is the result.

    Raises:
        UnrelatedBases: the held-out probes speak against both, and `force` is not set.
        ShapeMismatch: the fit is to start from a copy, and there is none.
        ProLoRAError: see `prolora.fit` and `probe.fit_to_models`.
    """
    job = prepare_fit(lora, source, target, options)
    blank = _outline_result(job)
    adapters.check_format(blank, options.format or "auto")
    inputs = _check_kept(source, target, options)
    rival = _move_rival(job)
    if rival is None and options.start == "copy":
        raise ShapeMismatch(NO_COPY)
    updates, report = _fit_models(job, rival.done.adapter.updates if rival else {}, inputs)
    gate, files = report.gate, list_inputs(lora, source, target)
    if gate and gate.decision == COPY and not options.force:
        if not gate.copy_serves:
            raise UnrelatedBases(f"neither a fit nor moving by weights serves here: {gate.reason}")
        if rival:
            moved, told = _scale_rival(rival, report, gate.copy_strength, job, _read_notes(notes))
            return Transfer(moved, told, files)
    return Transfer(*_finish_fit(job, blank, updates, report, _read_notes(notes)), files)


def prepare_fit(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: FitOptions,
    depth: Depth = "updates",
) -> FitJob:
    """Reads and plans; refuses all that can be refused without running a model.

    Args:
        lora: what is fitted.
        source: the base it was trained on.
        target: the base it goes to.
        options: how.
        depth: how far the LoRA is read.

    Raises:
        LowCoverage: fewer modules have a place than was asked for.
        ProLoRAError: see `prolora.fit`.
    """
    check_fittable(source, target)
    # Running models of equal weights may differ in schedule, steps and guidance.
    moving = replace(options.as_moved("copy"), again=options.again)
    check_bases(lora, source, target, moving, may_be_one=True)
    adapter = read_lora(lora, source, depth)
    plan = plan_modules(adapter, source, target, options.text_encoder)
    rows = outline_report(adapter, plan, source, target, options).modules
    check_coverage(rows, options.min_coverage)
    return FitJob(adapter, plan, source, target, options)


def _check_kept(source: Base, target: Base, options: FitOptions) -> Inputs:
    """Refuses a folder of kept results that were made from other files, before anything is loaded.

    Returns:
        What both pipelines are made of, by file; nothing where nothing is kept.

    Raises:
        OutputError: see `check_inputs`.
    """
    from ...probe.checkpoint import check_inputs

    if options.resume is None:
        return {}
    assert source.path is not None and target.path is not None
    folders = {"the source: files": source.path, "the target: files": target.path}
    inputs = {name: describe_pipeline_folder(path) for name, path in folders.items()}
    check_inputs(Path(options.resume), inputs)
    return inputs


def _outline_result(job: FitJob) -> Adapter:
    """The adapter of the target, before its updates have values."""
    outline = outline_fit(job.adapter, job.plan, job.source, job.target)
    return replace(job.adapter, updates=outline, kernels={}, vectors={}, unread={})


def _read_notes(notes: MakeNotes | None) -> dict[str, str]:
    return {} if notes is None else prefix_notes(notes(BasisCache(None)))


@dataclass(frozen=True)
class _Rival:
    """What moving by weights alone makes of the LoRA: the result, and how that was decided."""

    done: Transfer
    ledger: Ledger


def _move_rival(job: FitJob) -> _Rival | None:
    """What `auto` makes of the LoRA, a copy where it refuses; None where shapes differ."""
    methods: tuple[MethodChoice, ...] = ("auto", "copy")
    for method in methods:
        options = replace(job.options.as_moved(method), min_coverage=0.0, dtype=None)
        try:
            with BasisCache(options.cache).saving() as cache:
                pair = BasePair(job.source, job.target, options, cache)
                (ledger,) = pair.move([pair.plan(job.adapter)])
                return _Rival(pair.finish(ledger, hashed=False), ledger)
        except UnrelatedBases:
            continue
        except ProLoRAError:
            return None
    return None


@dataclass(frozen=True)
class _AskedLora:
    """A LoRA as running models are asked about it.

    Attributes:
        adapter: its part in the UNet or transformer of the source.
        rival: what the target would get there without a fit.
        text: its part in text encoders that the target does not have: the source alone runs it, so
            that what it changes is fitted into the target's blocks.
        carried: its part in text encoders that both have: both run it from the beginning, since the
            result holds it unchanged.
    """

    adapter: Adapter
    rival: Mapping[str, LowRank]
    text: Mapping[str, LowRank]
    carried: Mapping[str, LowRank]

    @classmethod
    def of(cls, job: FitJob, rival: Mapping[str, LowRank]) -> _AskedLora:
        """The parts of a LoRA; nothing of the text encoders where these are to be left out."""
        updates, passed = job.adapter.updates, set(job.plan.passed)
        denoiser, moved = (
            {name: u for name, u in side.items() if not is_in_text_encoder(name)}
            for side in (updates, rival)
        )
        text: dict[str, LowRank] = {}
        carried: dict[str, LowRank] = {}
        if job.options.text_encoder != "skip":
            for name in updates:
                if is_in_text_encoder(name) and name in job.source.shapes:
                    (carried if name in passed else text)[name] = updates[name]
        return cls(job.adapter.with_updates(denoiser), moved, text, carried)

    def describe(self, samplers: Callable[[], str]) -> str:
        """What the samplers do, and what both models' text encoders run with, as a text."""
        from ...probe.checkpoint import hash_updates

        return samplers() + (hash_updates(self.carried) if self.carried else "")


def _fit_models(
    job: FitJob, rival: Mapping[str, LowRank], inputs: Inputs
) -> tuple[dict[str, LowRank], ProbeReport]:
    """Runs the pipelines and fits: target module -> update.

    Args:
        job: the LoRA.
        rival: the updates that the target would get without probing; empty where there are none.
        inputs: see `_check_kept`.
    """
    from ...probe import pipelines
    from ...probe.checkpoint import open_checkpoints
    from ...probe.pipelines.schedules import FLOW

    source, target, options = job.source, job.target, job.options
    assert source.path is not None and target.path is not None
    asked = _AskedLora.of(job, rival)
    stack = contextlib.ExitStack()
    with stack:
        models, inputs = _open_both(job, asked, inputs, stack)
        denoisers = models[0].denoiser, models[1].denoiser
        checkpoints = open_checkpoints(options.resume, *denoisers, inputs)
        takes_prompts = all("prompt" in model.accepted for model in models)
        derived = _choose_prompts(job) if takes_prompts and not options.prompts else ()
        images = itertools.count(1)

        def count_image() -> None:
            if options.progress:
                options.progress(next(images), 6 * options.images, "sampling")

        shared = vae.explain_different_latents(source.path, target.path) is None
        mixed = len({model.schedule.kind == FLOW for model in models}) > 1
        sampled: FitSettings = replace(options, prompts=options.prompts or derived)
        if options.memory_limit is not None:
            sampled = replace(sampled, max_memory=_memory_left(options.memory_limit))
        few = pipelines.takes_few_steps(sampled, models[1].derive_target_settings(sampled))
        # Between a flow and another path, and for a target of few steps, the images of the
        # samplings say more than their calls.
        crosses = not shared or mixed or few
        fit = functools.partial(_fit_crossing, shared=shared) if crosses else _fit_pair
        result = fit(models, sampled, asked, checkpoints, count_image)
    fitted = {name: update.to("cpu") for name, update in result.adapter.updates.items()}
    result.report.derived_prompts = derived
    return fitted, result.report


def _choose_prompts(job: FitJob) -> tuple[str, ...]:
    """The prompts that are given, or else those that the LoRA's header leads to."""
    return job.options.prompts or derive_prompts(read_training_words(job.adapter.metadata))


def _open_both(
    job: FitJob, asked: _AskedLora, inputs: Inputs, stack: contextlib.ExitStack
) -> tuple[tuple[Pipeline, Pipeline], Inputs]:
    """Loads both pipelines, one after the other: the text encoders of the first make room.

    Args:
        job: the LoRA.
        asked: the same, as the models are asked about it.
        inputs: what both are made of, by file; their parts are added where there are any.
        stack: keeps what runs beside text encoders in place.
    """
    from ...probe import pipelines

    source, target, options = job.source.path, job.target.path, job.options
    assert source is not None and target is not None
    if options.memory_limit is not None:
        _check_memory(options.memory_limit, source, target, options.device)
    sampled = replace(options, prompts=_choose_prompts(job))
    models: list[Pipeline] = []
    for side, path in (("source", source), ("target", target)):
        model = pipelines.open_pipeline(path, options.device)
        if inputs:
            inputs = {**inputs, f"the {side}: parts": model.parts}
        stack.enter_context(pipelines.run_text_encoders_beside(model, asked.carried))
        if side == "source":
            with pipelines.run_text_encoders_beside(model, asked.text):
                model.encode_prompts(sampled)
            model.encode_prompts(sampled)
        else:
            model.encode_prompts(model.derive_target_settings(sampled))
        model.release_encoders()
        models.append(model)
    return (models[0], models[1]), inputs


def _fit_pair(
    models: tuple[Pipeline, Pipeline],
    sampled: FitSettings,
    asked: _AskedLora,
    checkpoints: Checkpoints,
    on_image: Callable[[], None],
) -> ProbeTransfer:
    """The fit between pipelines with the same latents.

    Args:
        models: source and target.
        sampled: what is sampled, and how it is fitted.
        asked: the LoRA.
        checkpoints: where results are kept.
        on_image: called after each sampled image.
    """
    from ...probe.pipelines import pair_pipelines
    from ...probe.recording.recorder import Recorder
    from ...probe.run import fit_from_recorder

    pair = pair_pipelines(*models, sampled, asked.text)
    samplers = pair.samplers(on_image)
    text = asked.describe(pair.describe_sampling) if checkpoints.folder else ""
    recorder = Recorder(
        pair.source.denoiser,
        pair.target.denoiser,
        asked.adapter,
        samplers,
        pair.translation,
        checkpoints,
        text,
        asked.text,
    )
    result = fit_from_recorder(recorder, asked.rival, sampled, functools.partial(_release, models))
    result.report.log_snr = pair.log_snr
    return result


def _fit_crossing(
    models: tuple[Pipeline, Pipeline],
    sampled: FitSettings,
    asked: _AskedLora,
    checkpoints: Checkpoints,
    on_image: Callable[[], None],
    shared: bool,
) -> ProbeTransfer:
    """The fit by images; arguments as in `_fit_pair`, and whether the latents are the same."""
    from ...probe.models import check_models
    from ...probe.pipelines import (
        CrossingRecorder,
        TextPart,
        check_shown,
        describe_crossing,
        observe_sides,
    )
    from ...probe.run import fit_from_recorder

    check_models(models[0].denoiser, models[1].denoiser, asked.adapter)
    for model in () if shared else models:
        check_shown(model.pipe, model.name)
    ours, theirs = observe_sides(*models, sampled, shared)
    describe = functools.partial(describe_crossing, ours, theirs)
    text = asked.describe(describe) if checkpoints.folder else ""
    part = TextPart.of(models[0], asked.text, ours.settings)
    recorder = CrossingRecorder(
        ours, theirs, asked.adapter, checkpoints, text, on_image, text_part=part
    )
    result = fit_from_recorder(recorder, asked.rival, sampled, functools.partial(_release, models))
    result.report.log_snr = recorder.log_snr
    return result


def _release(models: tuple[Pipeline, Pipeline]) -> None:
    """Frees what does not run again once both models were asked: all but the target's denoiser."""
    models[0].release(keep_denoiser=False)
    models[1].release(keep_denoiser=True)


def _check_memory(limit: int, source: Path, target: Path, device: str | None) -> None:
    """Refuses a bound that the models alone exceed, before they are loaded.

    Raises:
        TooLittleMemory: says the least that is needed.
    """
    from ...probe.pipelines import estimate_bytes

    (ours, others), (theirs, rest) = (estimate_bytes(path) for path in (source, target))
    on_host = device is None or device.startswith("cpu")
    least = resident_bytes() + max(ours + others, theirs + rest + (others if on_host else 0))
    if least > limit:
        raise TooLittleMemory(
            f"a bound of {format_size(limit)} on memory is too little: the two pipelines alone "
            f"need {format_size(least)} at a time"
        )


def _memory_left(limit: int) -> int:
    """What a bound on memory leaves for calls and streams once the models are there.

    Raises:
        TooLittleMemory: nothing.
    """
    taken = resident_bytes()
    if taken >= limit:
        raise TooLittleMemory(
            f"a bound of {format_size(limit)} on memory is too little: the two pipelines alone "
            f"take {format_size(taken)}"
        )
    return limit - taken


def _finish_fit(
    job: FitJob,
    blank: Adapter,
    fitted: dict[str, LowRank],
    probe: ProbeReport,
    notes: dict[str, str],
) -> tuple[Adapter, Report]:
    """The adapter of the target, and the report, of what was fitted."""
    adapter, plan, target = job.adapter, job.plan, job.target
    strength = probe.gate.strength if probe.gate else 1.0
    how = "fitted to the running models" if probe.trust else "copied; nothing was fitted"
    rows = _list_rows(job, fitted, strength, how)
    updates = fitted | {name: adapter.updates[name] for name in plan.passed}
    made = {"prolora.method": FIT, "prolora.strength": f"{strength:.4g}"}
    metadata = _describe_result(job) | made | _describe_gate(probe, job.options) | notes
    for name in _OF_TRANSFERS:
        metadata.pop(f"prolora.{name}", None)
    moved = replace(
        blank, updates=updates, kernels=_kernel_sizes(updates, target), metadata=metadata
    )
    report = build_fit_report(
        job.source,
        target,
        job.options,
        rows,
        list_vectors(adapter) | list_tensors_left_out(adapter),
        unread=list_missed(adapter, job.options.text_encoder),
        strength=strength,
        probe=probe,
        seconds=dict(probe.seconds),
        provenance=read_provenance(metadata),
    )
    return moved, report


def _describe_result(job: FitJob) -> dict[str, str]:
    """The header of a result as that of any transfer."""
    options = job.options.as_moved("copy")
    return build_metadata(Ledger(job.adapter, job.plan, job.source, job.target, options))


def _list_rows(
    job: FitJob, fitted: Mapping[str, LowRank], strength: float, how: str
) -> list[ModuleReport]:
    """What became of every module; `how` is said of those that got an update.

    Where the fit starts from the copied updates, those outside the blocks stay copied.
    """
    plan = job.plan
    copied = {name for name in plan.skipped if name in fitted}
    skipped = {name: reason for name, reason in plan.skipped.items() if name not in copied}
    plan = replace(plan, skipped=skipped)
    rows = []
    for row in list_modules(job.adapter, plan, fitted, how):
        if row.source in copied:
            row = replace(row, reason="copied; the fit in the blocks goes on from there")
        rows.append(replace(row, strength=strength) if row.rank_out else row)
    return rows


def _describe_gate(probe: ProbeReport, options: FitOptions) -> dict[str, str]:
    """What the header of the file says of a fit, beside what it says of any transfer."""
    gate = probe.gate
    return {
        "prolora.probe_calls": str(probe.probes),
        "prolora.probe_prompts": str(len(options.prompts or probe.derived_prompts)),
        "prolora.probe_decision": gate.decision if gate else "",
        "prolora.probe_share": f"{gate.share['all']:.3f}" if gate else "",
        "prolora.probe_start": probe.start,
    }


def _kernel_sizes(updates: Mapping[str, LowRank], target: Base) -> dict[str, tuple[int, int]]:
    """(kh, kw) of those that are convolutions of the target."""
    shapes = {name: target.shapes.get(name, ()) for name in updates}
    return {name: (s[2], s[3]) for name, s in shapes.items() if len(s) == 4}


def _scale_rival(
    rival: _Rival, probe: ProbeReport, factor: float, job: FitJob, notes: dict[str, str]
) -> tuple[Adapter, Report]:
    """A LoRA moved by weights alone, at the strength that held-out probes chose."""
    adapter, report = rival.done.adapter, rival.done.report

    def is_scaled(name: str | None) -> bool:
        return name is not None and not is_in_text_encoder(name)

    updates = {
        name: LowRank(u.up * factor, u.down) if is_scaled(name) else u
        for name, u in adapter.updates.items()
    }
    vectors = {n: factor * v if is_scaled(n) else v for n, v in adapter.vectors.items()}
    rows = tuple(
        replace(row.at_strength(factor), strength=row.strength * factor)
        if is_scaled(row.target)
        else row
        for row in report.modules
    )
    strength = report.strength * factor
    facts = {"prolora.strength": f"{strength:.4g}", "prolora.asked": FIT}
    metadata = build_metadata(rival.ledger) | facts | _describe_gate(probe, job.options) | notes
    moved = replace(adapter, updates=updates, vectors=vectors, metadata=metadata)
    report = replace(
        report,
        asked=FIT,
        probe=probe,
        strength=strength,
        modules=rows,
        provenance=read_provenance(metadata),
    )
    return moved, report
