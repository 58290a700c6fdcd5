"""The stages of a fit: refuse, open two pipelines, run and fit them, assemble."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from .. import adapters
from ..adapters.adapter import Adapter
from ..adapters.formats.moves import read_provenance
from ..architectures.modules import is_in_text_encoder
from ..bases import Base, vae
from ..bases.cache.basis_cache import BasisCache
from ..core.lowrank import LowRank
from ..core.methods import MethodChoice
from ..errors import ProLoRAError, ShapeMismatch, UnrelatedBases
from ..moving.assembly import build_metadata, list_kernels
from ..moving.base_check import Depth, check_bases, read_lora
from ..moving.base_pair import BasePair
from ..moving.ledger import Ledger
from ..moving.options import FIT, LoraLike
from ..moving.result import Transfer, list_inputs
from ..moving.transfer_report import TransferReport
from ..reports.lora_report import LoraReport
from .common_parts import CommonParts
from .fit_numbers import ProbeReport
from .fit_plan import FitJob, check_fittable, explain_need, outline_fit, plan_modules
from .fit_report import FitReport, RivalReport, build_fit_report, list_modules, outline_report
from .gate import COPY
from .running import fit_models, plan_memory_of_card
from .settings import FitOptions
from .solver.joint import NO_COPY

_OF_TRANSFERS = ("rank_rule", "threshold")
"""What the header says of a LoRA that was moved by weights, and not of one that was fitted."""

SERVES = (
    "Moving by weights serves here: all of the LoRA has a place on {target}, and `transfer` takes "
    "seconds. On test models fits were at times worse there; this one is written only if held-out "
    "samples say that it is better."
)


def fit_to_pipelines(
    lora: LoraLike,  # what is fitted
    source: Base,  # the base it was trained on
    target: Base,  # the base it goes to
    options: FitOptions,  # how
    common: CommonParts | None = None,
) -> Transfer:
    """Fits a LoRA to the running models; refuses what it can before loading them.

    What moving by weights alone makes of the LoRA is its rival: where that does no worse on
    held-out probes, it is the result.
    """
    job = prepare_fit(lora, source, target, options)
    written = options.format or "auto", options.dtype
    outline = outline_fit(job.adapter, job.plan, source, target)
    origin = job.adapter.model.of_base(target.model)
    blank = replace(job.adapter, updates=outline, kernels={}, vectors={}, origin=origin, unread={})
    adapters.check_format(blank, written[0])
    common = common or CommonParts(options.resume)
    rival = move_rival(job)
    if rival is None and options.start == "copy":
        raise ShapeMismatch(NO_COPY)
    if rival is not None:
        found = rival.refusal or rival.done.report
        job = replace(job, serves=_tell_serving(source, target, options, found))
    with common.one_fit():
        copied = rival.done.adapter.updates if rival else {}
        updates, report, grid = fit_models(job, copied, common)
    gate, files = report.gate, list_inputs(lora, source, target)
    if gate and gate.decision == COPY and not options.force:
        if not gate.copy_serves:
            raise UnrelatedBases(f"neither a fit nor moving by weights serves here: {gate.reason}")
        if rival:
            moved, scaled = _scale_rival(rival, report, gate.copy_strength, job)
            return Transfer(moved, replace(scaled, grid=grid, why=job.serves), files, *written)
    fitted, fit_report = _finish_fit(job, blank, updates, report)
    return Transfer(fitted, replace(fit_report, grid=grid, why=job.serves), files, *written)


def prepare_fit(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: FitOptions,
    depth: Depth = "updates",
) -> FitJob:
    """Reads and plans; refuses all that can be refused without running a model.

    `depth` says how far the LoRA is read.
    """
    check_fittable(source, target)
    # Running models of equal weights may differ in schedule, steps and guidance.
    moving = replace(options.as_moved("copy"), again=options.again)
    check_bases(lora, source, target, moving, may_be_one=True)
    adapter = read_lora(lora, source, depth, target)
    plan = plan_modules(adapter, source, target, options.text_encoder)
    job = FitJob(adapter, plan, source, target, options)
    return replace(job, card=plan_memory_of_card(job))


def plan_fit(lora: LoraLike, source: Base, target: Base, options: FitOptions) -> FitReport:
    """Reports what would be fitted, carried over, skipped and refused, from headers alone."""
    return outline_report(prepare_fit(lora, source, target, options, "outline"))


def weigh_fit(lora: LoraLike, source: Base, target: Base, options: FitOptions) -> FitReport:
    """Reports as `plan_fit`, and compares the weights to say whether they serve."""
    report = plan_fit(lora, source, target, options)
    moving = options.as_moved("auto")
    try:
        found = BasePair.open(source, target, moving, dry_run=True).foresee(lora, weighed=True)
    except ProLoRAError:
        return report
    return replace(report, why=_tell_serving(source, target, options, found))


@dataclass(frozen=True)
class Rival:
    """What moving by weights alone makes of the LoRA: the result, and how that was decided."""

    done: Transfer
    ledger: Ledger
    refusal: UnrelatedBases | None = None  # of `auto`, in whose place a copy stands


def _tell_serving(
    source: Base, target: Base, options: FitOptions, found: LoraReport | ProLoRAError
) -> str:
    """Says that weights serve, by what `found` tells of the move; "" where they do not."""
    assert source.path is not None and target.path is not None
    differ = vae.explain_different_latents(source.path, target.path) is not None
    needed = differ or explain_need(found, source, target, options.target_steps)
    return "" if needed else SERVES.format(target=target.name)


def move_rival(job: FitJob) -> Rival | None:
    """Moves the LoRA by `auto`, or copies it; None where shapes differ."""
    methods: tuple[MethodChoice, ...] = ("auto", "copy")
    refusal = None
    with BasisCache(job.options.cache).saving() as cache:
        for method in methods:
            options = replace(job.options.as_moved(method), dtype=None)
            try:
                pair = BasePair(job.source, job.target, options, cache)
                ledger = pair.move(pair.plan(job.adapter))
                return Rival(pair.finish(ledger, hashed=False), ledger, refusal)
            except UnrelatedBases as error:
                refusal = error
            except ProLoRAError:
                return None
    return None


def _finish_fit(
    job: FitJob,
    blank: Adapter,
    fitted: dict[str, LowRank],
    probe: ProbeReport,
) -> tuple[Adapter, FitReport]:
    """Builds the target's adapter and the report of what was fitted."""
    adapter, plan, target = job.adapter, job.plan, job.target
    strength = probe.gate.strength if probe.gate else 1.0
    how = "fitted to the running models" if probe.trust else "copied; nothing was fitted"
    # Where the fit starts from the copied updates, copies of other kinds stay.
    copied = {name for name in plan.skipped if name in fitted}
    skipped = {name: reason for name, reason in plan.skipped.items() if name not in copied}
    rows = []
    for row in list_modules(adapter, replace(plan, skipped=skipped), fitted, how):
        if row.source in copied:
            row = replace(row, reason="copied; the fit goes on from there")
        fits = row.rank_out and row.source not in plan.passed
        rows.append(replace(row, strength=strength) if fits else row)
    updates = fitted | {name: adapter.updates[name] for name in plan.passed}
    made = {"prolora.method": FIT, "prolora.strength": f"{strength:.4g}"}
    options = job.options.as_moved("copy")
    written = build_metadata(Ledger(adapter, plan, job.source, target, options))
    metadata = written | made | _describe_gate(probe, job.options)
    for name in _OF_TRANSFERS:
        metadata.pop(f"prolora.{name}", None)
    moved = replace(
        blank, updates=updates, kernels=list_kernels(updates, target), metadata=metadata
    )
    report = build_fit_report(
        job,
        rows,
        strength=strength,
        probe=probe,
        seconds=dict(probe.seconds),
        provenance=read_provenance(metadata),
    )
    return moved, report


def _describe_gate(probe: ProbeReport, options: FitOptions) -> dict[str, str]:
    """Writes what a fit's header says beside any transfer's."""
    gate = probe.gate
    return {
        "prolora.probe_calls": str(probe.probes),
        "prolora.probe_prompts": str(len(options.prompts or probe.derived_prompts)),
        "prolora.probe_decision": gate.decision if gate else "",
        "prolora.probe_share": f"{gate.share['all']:.3f}" if gate else "",
        "prolora.probe_start": probe.start,
    }


def _scale_rival(
    rival: Rival, probe: ProbeReport, factor: float, job: FitJob
) -> tuple[Adapter, RivalReport]:
    """Scales a LoRA moved by weights to the strength of held-out probes."""
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
    assert isinstance(report, TransferReport)
    strength = report.strength * factor
    facts = {"prolora.strength": f"{strength:.4g}", "prolora.asked": FIT}
    metadata = build_metadata(rival.ledger) | facts | _describe_gate(probe, job.options)
    moved = replace(adapter, updates=updates, vectors=vectors, metadata=metadata)
    known = {known.name: getattr(report, known.name) for known in fields(report)} | {
        "asked": FIT,
        "strength": strength,
        "modules": rows,
        "provenance": read_provenance(metadata),
    }
    return moved, RivalReport(**known, probe=probe)
