"""What is written after a fit: the fitted LoRA, or the one moved by weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from ..adapters.adapter import Adapter
from ..adapters.formats.moves import read_provenance
from ..architectures.modules import is_in_text_encoder
from ..bases.cache.basis_cache import BasisCache
from ..core.lowrank import LowRank
from ..core.methods import MethodChoice
from ..errors import ProLoRAError, UnrelatedBases
from ..moving.assembly import build_metadata, list_kernels
from ..moving.base_pair import BasePair
from ..moving.ledger import Ledger
from ..moving.transfer_report import TransferReport
from ..verbs.options import FIT
from ..verbs.result import Transfer
from .fit_plan import FitJob
from .fit_report import BaselineReport, FitReport, build_fit_report, list_modules
from .probe_report import ProbeReport
from .run import Fitted
from .settings import FitOptions

_OF_TRANSFERS = ("rank_rule", "threshold")
"""What the header says of a LoRA that was moved by weights, and not of one that was fitted."""


@dataclass(frozen=True)
class Baseline:
    """What moving by weights alone makes of the LoRA: the result, and how that was decided."""

    done: Transfer
    ledger: Ledger
    refusal: UnrelatedBases | None = None  # of `auto`, in whose place a copy stands


def move_by_weights(job: FitJob) -> Baseline | None:
    """Moves the LoRA by `auto`, or copies it; None where shapes differ."""
    methods: tuple[MethodChoice, ...] = ("auto", "copy")
    refusal = None
    with BasisCache(job.options.cache).flush_at_end() as cache:
        for method in methods:
            options = replace(job.options.transfer_options(method), dtype=None)
            try:
                pair = BasePair(job.source, job.target, options, cache)
                ledger = pair.move(pair.plan(job.adapter))
                return Baseline(pair.finish(ledger, hashed=False), ledger, refusal)
            except UnrelatedBases as error:
                refusal = error
            except ProLoRAError:
                return None
    return None


def finish_fit(job: FitJob, blank: Adapter, result: Fitted) -> tuple[Adapter, FitReport]:
    """Builds the target's adapter and the report of what was fitted."""
    probe = result.report
    how = "fitted to the running models" if probe.trust else "copied; nothing was fitted"
    made = _describe_gate(probe, job.options)
    adapter, report = finish_updates(job, blank, result.scaled, how, made, probe.gate.strength)
    return adapter, replace(report, probe=probe, seconds=dict(probe.seconds))


def finish_updates(
    job: FitJob,
    blank: Adapter,
    fitted: Mapping[str, LowRank],  # of the target
    how: str,  # what was done to each module
    made: dict[str, str],  # more for the header
    strength: float = 1.0,
) -> tuple[Adapter, FitReport]:
    """Builds the target's adapter and its report from updates of the denoiser."""
    adapter, plan, target = job.adapter, job.plan, job.target
    # Where the fit starts from the copied updates, copies of other kinds stay.
    copied = {name for name in plan.skipped if name in fitted}
    skipped = {name: reason for name, reason in plan.skipped.items() if name not in copied}
    rows = []
    for row in list_modules(adapter, replace(plan, skipped=skipped), fitted, how):
        if row.source in copied:
            row = replace(row, reason="copied; the fit goes on from there")
        fits = row.rank_out and row.source not in plan.passed
        rows.append(replace(row, strength=strength) if fits else row)
    updates = dict(fitted) | {name: adapter.updates[name] for name in plan.passed}
    facts = {"prolora.method": FIT, "prolora.strength": f"{strength:.4g}"} | made
    options = job.options.transfer_options("copy")
    metadata = build_metadata(Ledger(adapter, plan, job.source, target, options)) | facts
    for name in _OF_TRANSFERS:
        metadata.pop(f"prolora.{name}", None)
    moved = replace(
        blank, updates=updates, kernels=list_kernels(updates, target), metadata=metadata
    )
    origin = read_provenance(metadata)
    return moved, build_fit_report(job, rows, strength=strength, provenance=origin)


def _describe_gate(probe: ProbeReport, options: FitOptions) -> dict[str, str]:
    gate = probe.gate
    return {
        "prolora.probe_samples": str(probe.samples[0]),
        "prolora.probe_prompts": str(len(options.prompts or probe.derived_prompts)),
        "prolora.probe_decision": gate.decision,
        "prolora.probe_share": f"{gate.share['all']:.3f}",
        "prolora.probe_start": probe.start,
    }


def finish_baseline(
    job: FitJob, baseline: Baseline, probe: ProbeReport
) -> tuple[Adapter, BaselineReport]:
    """Scales a LoRA moved by weights to the strength of held-out probes."""
    adapter, report = baseline.done.adapter, baseline.done.report
    factor = probe.gate.copy_strength

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
    metadata = build_metadata(baseline.ledger) | facts | _describe_gate(probe, job.options)
    moved = replace(adapter, updates=updates, vectors=vectors, metadata=metadata)
    known = {known.name: getattr(report, known.name) for known in fields(report)} | {
        "asked": FIT,
        "strength": strength,
        "modules": rows,
        "provenance": read_provenance(metadata),
    }
    return moved, BaselineReport(**known, probe=probe)
