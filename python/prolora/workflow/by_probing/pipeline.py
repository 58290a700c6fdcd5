"""The stages of a transfer by probing: refuse, open two pipelines, run and fit them, assemble."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from ...probe.gate import COPY, Gate
from ...probe.report import ProbeReport
from ...probe.settings import FitSettings, Probing
from ..base_check import check_bases
from ..by_weights.assembly import build_metadata
from ..by_weights.base_pair import BasePair, MakeNotes, list_inputs, prefix_notes, read_lora
from ..by_weights.ledger import Ledger
from ..by_weights.rows import check_coverage, list_missed, list_tensors_left_out
from ..module_report import ModuleReport
from ..options import PROBE, LoraLike, MethodChoice, TransferOptions
from ..result import Transfer
from .plan import check_probing, outline_fit, plan_probing
from .rows import build_probe_report, list_modules, list_vectors, outline_report

if TYPE_CHECKING:
    from ...probe.checkpoint import Checkpoints, Inputs
    from ...probe.pipelines import Pipeline
    from ...probe.run import ProbeTransfer


def transfer_by_probing(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: TransferOptions,
    notes: MakeNotes | None = None,
) -> Transfer:
    """Fits a LoRA to the running models; refuses all that it can before a model is loaded.

    What moving by weights alone makes of the LoRA is its rival: where that does no worse on
    held-out probes, it is the result.

    Raises:
        UnrelatedBases: the held-out probes speak against both, and `force` is not set.
        ShapeMismatch: the fit is to start from a copy, and there is none.
        ProLoRAError: see `prolora.transfer` and `probe.fit_lora`.
    """
    check_probing(source, target, options)
    check_bases(lora, source, target, options)
    adapter = read_lora(lora, source)
    plan = plan_probing(adapter, source, target, options)
    route = Ledger(adapter, plan, source, target, options, lora)
    blank = _outline_result(route)
    adapters.check_format(blank, options.format or "auto")
    outline = outline_report(adapter, source, target, options)
    check_coverage(outline.modules, options.min_coverage)
    inputs = _check_kept(source, target, options)
    rival = _move_rival(route)
    if rival is None and options.probe.start == "copy":
        raise ShapeMismatch(NO_COPY)
    updates, report = _fit_models(route, rival.done.adapter.updates if rival else {}, inputs)
    gate = report.gate
    if gate and gate.decision == COPY and not options.probe.force:
        if not gate.copy_serves:
            raise UnrelatedBases(
                f"neither probing nor moving by weights serves here: {gate.reason}"
            )
        if rival:
            return _scale_rival(rival, report, gate.copy_strength, _read_notes(notes))
    return _finish_probing(route, blank, updates, report, _read_notes(notes))


def _check_kept(source: Base, target: Base, options: TransferOptions) -> Inputs:
    """Refuses a folder of kept results that were made from other files, before anything is loaded.

    Returns:
        What both pipelines are made of, by file; nothing where nothing is kept.

    Raises:
        OutputError: see `check_inputs`.
    """
    from ...probe.checkpoint import check_inputs

    if options.probe.resume is None:
        return {}
    assert source.path is not None and target.path is not None
    folders = {"the source: files": source.path, "the target: files": target.path}
    inputs = {name: describe_pipeline_folder(path) for name, path in folders.items()}
    check_inputs(Path(options.probe.resume), inputs)
    return inputs


def _outline_result(route: Ledger) -> Adapter:
    """The adapter of the target, before its updates have values."""
    outline = outline_fit(route.adapter, route.plan, route.source, route.target)
    return replace(route.adapter, updates=outline, kernels={}, vectors={}, unread={})


def _read_notes(notes: MakeNotes | None) -> dict[str, str]:
    return {} if notes is None else prefix_notes(notes(BasisCache(None)))


@dataclass(frozen=True)
class _Rival:
    """What moving by weights alone makes of the LoRA: the result, and how that was decided."""

    done: Transfer
    ledger: Ledger


def _move_rival(route: Ledger) -> _Rival | None:
    """What `auto` makes of the LoRA, a copy where it refuses; None where shapes differ."""
    methods: tuple[MethodChoice, ...] = ("auto", "copy")
    for method in methods:
        # The bases were looked at before, and running models of equal weights are two.
        options = replace(route.options, method=method, progress=None, dtype=None, again=True)
        try:
            with BasisCache(options.cache).saving() as cache:
                pair = BasePair(route.source, route.target, options, cache)
                (ledger,) = pair.move([pair.plan(route.adapter)])
                return _Rival(pair.finish(ledger, hashed=False), ledger)
        except UnrelatedBases:
            continue
        except ProLoRAError:
            return None
    return None


def _fit_models(
    route: Ledger, rival: Mapping[str, LowRank], inputs: Inputs
) -> tuple[dict[str, LowRank], ProbeReport]:
    """Runs the pipelines and fits: target module -> update at the strength asked for.

    Args:
        route: of the LoRA.
        rival: the updates that the target would get without probing; empty where there are none.
        inputs: see `_check_kept`.
    """
    from ...probe import pipelines
    from ...probe.checkpoint import open_checkpoints
    from ...probe.pipelines.schedules import FLOW

    source, target, options = route.source, route.target, route.options
    assert source.path is not None and target.path is not None
    models = [pipelines.open_pipeline(p, options.device) for p in (source.path, target.path)]
    if inputs:
        sides = ("the source: parts", "the target: parts")
        inputs = {**inputs, **{n: model.parts for n, model in zip(sides, models, strict=True)}}
    denoisers = models[0].denoiser, models[1].denoiser
    checkpoints = open_checkpoints(options.probe.resume, *denoisers, inputs)
    updates = _drop_text_encoders(route.adapter.updates)
    adapter = route.adapter.with_updates(updates)
    settings, sampled = _fit_settings(options), options.probe
    derived: tuple[str, ...] = ()
    if not sampled.prompts and all("prompt" in model.accepted for model in models):
        derived = derive_prompts(read_training_words(route.adapter.metadata))
        sampled = replace(sampled, prompts=derived)
    images = itertools.count(1)

    def count_image() -> None:
        if options.progress:
            options.progress(next(images), 6 * options.probe.images, "sampling")

    shared = vae.explain_different_latents(source.path, target.path) is None
    mixed = len({model.schedule.kind == FLOW for model in models}) > 1
    few = pipelines.takes_few_steps(sampled, models[1].derive_target_settings(sampled))
    # Between a flow and another path, and for a target of few steps, the images of the samplings
    # say more than their calls.
    crosses = not shared or mixed or few
    fit = functools.partial(_fit_crossing, shared=shared) if crosses else _fit_pair
    result = fit(
        (models[0], models[1]),
        sampled,
        (adapter, _drop_text_encoders(rival)),
        settings,
        checkpoints,
        count_image,
    )
    fitted = {
        name: LowRank(update.up * options.factor, update.down).to("cpu")
        for name, update in result.adapter.updates.items()
    }
    result.report.derived_prompts = derived
    return fitted, result.report


def _fit_pair(
    models: tuple[Pipeline, Pipeline],
    sampled: Probing,
    loras: tuple[Adapter, Mapping[str, LowRank]],
    settings: dict[str, Any],
    checkpoints: Checkpoints,
    on_image: Callable[[], None],
) -> ProbeTransfer:
    """The fit between pipelines with the same latents.

    Args:
        models: source and target.
        sampled: what is sampled.
        loras: the LoRA of the source, and its rival on the target.
        settings: of the fit.
        checkpoints: where results are kept.
        on_image: called after each sampled image.
    """
    from ...probe.pipelines import pair_pipelines
    from ...probe.recording.recorder import Recorder
    from ...probe.run import fit_from_recorder

    pair = pair_pipelines(*models, sampled)
    samplers = (
        pair.source.sampler(pair.settings, on_image),
        pair.source.sampler(pair.settings.with_lora(), on_image),
        pair.target.sampler(pair.of_target, on_image),
    )
    text = pair.describe_sampling() if checkpoints.folder else ""
    denoisers = pair.source.denoiser, pair.target.denoiser
    recorder = Recorder(*denoisers, loras[0], samplers, pair.translation, checkpoints, text)
    result = fit_from_recorder(recorder, loras[1], FitSettings(samplers=text, **settings))
    result.report.log_snr = pair.log_snr
    return result


def _fit_crossing(
    models: tuple[Pipeline, Pipeline],
    sampled: Probing,
    loras: tuple[Adapter, Mapping[str, LowRank]],
    settings: dict[str, Any],
    checkpoints: Checkpoints,
    on_image: Callable[[], None],
    shared: bool,
) -> ProbeTransfer:
    """The fit by images; arguments as in `_fit_pair`, and whether the latents are the same."""
    from ...probe.models import check_models
    from ...probe.pipelines import CrossingRecorder, check_shown, describe_crossing, observe_sides
    from ...probe.run import fit_from_recorder

    adapter, rival = loras
    check_models(models[0].denoiser, models[1].denoiser, adapter)
    for model in () if shared else models:
        check_shown(model.pipe, model.name)
    ours, theirs = observe_sides(*models, sampled, shared)
    text = describe_crossing(ours, theirs) if checkpoints.folder else ""
    recorder = CrossingRecorder(ours, theirs, adapter, checkpoints, text, on_image)
    result = fit_from_recorder(recorder, rival, FitSettings(samplers=text, **settings))
    result.report.log_snr = recorder.log_snr
    return result


def _fit_settings(options: TransferOptions) -> dict[str, Any]:
    """The options of a transfer as `probe.fit_lora` takes them."""
    settings: dict[str, Any] = {
        "force": options.probe.force,
        "progress": options.progress,
        "start": options.probe.start,
        "steps": options.probe.fit_steps,
    }
    if options.probe.resume is not None:
        settings["resume"] = options.probe.resume
    if options.memory_limit is not None:
        settings["max_memory"] = _memory_left(options.memory_limit)
    settings["rank"] = None if options.out_rank == "exact" else options.out_rank
    return settings


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


def _drop_text_encoders(updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The updates of the UNet or transformer: text encoders are not run with the LoRA."""
    return {name: u for name, u in updates.items() if not is_in_text_encoder(name)}


def _finish_probing(
    route: Ledger,
    blank: Adapter,
    fitted: dict[str, LowRank],
    probe: ProbeReport,
    notes: dict[str, str],
) -> Transfer:
    """The adapter of the target, and the report, of what was fitted."""
    adapter, plan, source, target = route.adapter, route.plan, route.source, route.target
    gate = probe.gate
    strength = route.options.factor * (gate.strength if gate else 1.0)
    how = "fitted to the running models" if probe.trust else "copied; nothing was fitted"
    rows = _list_rows(route, fitted, strength, how)
    updates = fitted | {name: adapter.updates[name] for name in plan.passed}
    decided = replace(route, options=replace(route.options, strength=strength))
    metadata = build_metadata(decided) | _describe_gate(probe, gate, route.options) | notes
    moved = replace(
        blank, updates=updates, kernels=_kernel_sizes(updates, target), metadata=metadata
    )
    report = build_probe_report(
        source,
        target,
        route.options,
        rows,
        list_vectors(adapter) | list_tensors_left_out(adapter),
        unread=list_missed(adapter, route.options),
        strength=strength,
        probe=probe,
        seconds=dict(probe.seconds),
        provenance=read_provenance(metadata),
    )
    return Transfer(moved, report, list_inputs(route.lora, source, target))


def _list_rows(
    route: Ledger, fitted: Mapping[str, LowRank], strength: float, how: str
) -> list[ModuleReport]:
    """What became of every module; `how` is said of those that got an update.

    Where the fit starts from the copied updates, those outside the blocks stay copied.
    """
    plan = route.plan
    copied = {name for name in plan.skipped if name in fitted}
    skipped = {name: reason for name, reason in plan.skipped.items() if name not in copied}
    plan = replace(plan, skipped=skipped)
    rows = []
    for row in list_modules(route.adapter, plan, fitted, how):
        if row.source in copied:
            row = replace(row, reason="copied; the fit in the blocks goes on from there")
        rows.append(replace(row, strength=strength) if row.rank_out else row)
    return rows


def _describe_gate(
    probe: ProbeReport, gate: Gate | None, options: TransferOptions
) -> dict[str, str]:
    """What the header of the file says of a probing, beside what it says of any transfer."""
    return {
        "prolora.probe_calls": str(probe.probes),
        "prolora.probe_prompts": str(len(options.probe.prompts or probe.derived_prompts)),
        "prolora.probe_decision": gate.decision if gate else "",
        "prolora.probe_share": f"{gate.share['all']:.3f}" if gate else "",
        "prolora.probe_start": probe.start,
    }


def _kernel_sizes(updates: Mapping[str, LowRank], target: Base) -> dict[str, tuple[int, int]]:
    """(kh, kw) of those that are convolutions of the target."""
    shapes = {name: target.shapes.get(name, ()) for name in updates}
    return {name: (s[2], s[3]) for name, s in shapes.items() if len(s) == 4}


def _scale_rival(
    rival: _Rival, probe: ProbeReport, factor: float, notes: dict[str, str]
) -> Transfer:
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
    facts = {"prolora.strength": f"{strength:.4g}", "prolora.asked": PROBE}
    metadata = build_metadata(rival.ledger) | facts | notes
    moved = replace(adapter, updates=updates, vectors=vectors, metadata=metadata)
    report = replace(
        report,
        asked=PROBE,
        probe=probe,
        strength=strength,
        modules=rows,
        provenance=read_provenance(metadata),
    )
    return Transfer(moved, report, rival.done.inputs)
