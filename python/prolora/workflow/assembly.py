"""What a transfer gives: the adapter of the target, and the account of every module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..adapters.adapter import Adapter
from ..adapters.metadata import rewrite_metadata
from ..bases import Base
from ..bases.cache.basis_cache import BasisCache
from ..bases.identity import compute_identity, compute_sha256, compute_short_hash
from ..core.lowrank import LowRank
from ..errors import LowCoverage
from ..version import __version__
from .move_updates import describe_unchanged
from .options import Options
from .plan import Plan
from .report import ModuleReport, Report
from .vectors import CarriedVectors, carry_vectors


def blank_report(
    adapter: Adapter,
    plan: Plan,
    source: Base,
    target: Base,
    options: Options,
    energies: Mapping[str, float] | None = None,
) -> Report:
    """A report that knows the plan: skipped and refused modules are in it already.

    Args:
        adapter: the LoRA as it came in.
        plan: where its modules go.
        source: base it comes from.
        target: base it goes to.
        options: how it is moved.
        energies: ‖ΔW_s‖² of modules without a place, as far as they are known.
    """
    report = Report(
        method=options.method,
        rank_rule=options.rank,
        threshold=options.threshold,
        match=plan.rule,
        source=source.name,
        target=target.name,
        strength=options.factor,
        left_out=dict(adapter.left_out),
        kept_energy=dict(adapter.kept_energy),
        decisions=plan.decisions,
        dropped_blocks=plan.dropped,
    )
    for status, reasons in (("skipped", plan.skipped), ("refused", plan.refused)):
        for name, reason in reasons.items():
            row = describe_unchanged(adapter, name, None, reason, (energies or {}).get(name))
            report.modules.append(replace(row, status=status, rank_out=0))
    return report


def describe_summed_module(row: ModuleReport, adapter: Adapter, plan: Plan) -> ModuleReport:
    """The row of a module that others may have been added to, with the rank it had in the LoRA."""
    added = sum(onto == row.source for onto in plan.summed.values())
    if not added:
        return row
    update = adapter.updates.get(row.source)
    reason = f"{row.reason}; updates of dropped blocks added: {added}"
    return replace(row, rank_in=update.rank if update else 0, reason=reason)


def list_summed_modules(
    adapter: Adapter, plan: Plan, moved: Mapping[str, str]
) -> list[ModuleReport]:
    """The rows of the modules that were added to others.

    Args:
        adapter: the LoRA as it came in.
        plan: says onto which.
        moved: source module -> target module of all that was moved.
    """
    rows = []
    for name, onto in plan.summed.items():
        reason = "its block is gone; added to the update of the nearest that is there"
        row = replace(
            describe_unchanged(adapter, name, moved.get(onto), reason), onto=onto, rank_out=0
        )
        if onto in moved:
            rows.append(replace(row, status="summed"))
        else:
            reason = "its block is gone, and the nearest that is there was skipped"
            rows.append(replace(row, status="skipped", reason=reason))
    return rows


def hollow_update(update: LowRank) -> LowRank:
    """An update of the same shape and rank that takes no memory."""
    zero = torch.zeros(1, 1)
    return LowRank(zero.expand(update.up.shape), zero.expand(update.down.shape))


def check_coverage(adapter: Adapter, plan: Plan, minimum: float) -> None:
    """Refuses early: the gate can only lower the coverage that names and shapes allow."""
    placed = {pair.source for pair in plan.pairs} & set(adapter.updates)
    placed |= {*plan.passed, *plan.summed}
    coverage = len(placed) / max(1, len(adapter.updates))
    if coverage < minimum:
        raise LowCoverage(
            f"{len(placed)} of {len(adapter.updates)} modules find a place on the target "
            f"(coverage {coverage:.2f}), fewer than --min-coverage {minimum:g}; nothing written"
        )


def explain_low_coverage(report: Report, minimum: float) -> str:
    """Why a finished transfer is not written."""
    return (
        f"coverage {report.coverage:.2f} is below --min-coverage {minimum:g} after the threshold "
        f"{report.threshold:g} on Φ; nothing written. Lower --threshold, or try --method copy"
    )


def outline_result(
    adapter: Adapter, plan: Plan, source: Base, target: Base, options: Options
) -> Adapter:
    """What the adapter of the target will consist of, before anything is moved."""
    updates = {pair.target: adapter.updates[pair.source] for pair in plan.pairs}
    updates |= {name: adapter.updates[name] for name in plan.passed}
    vectors = place_vectors_of(adapter, plan, source, target, options)
    return assemble_adapter(adapter, updates, vectors, target, adapter.metadata)


def place_vectors_of(
    adapter: Adapter,
    plan: Plan,
    source: Base,
    target: Base,
    options: Options,
    moved: Mapping[str, LowRank] | None = None,
) -> CarriedVectors:
    """The biases and normalisation layers of the target."""
    return carry_vectors(
        adapter,
        plan,
        source,
        target,
        factor=options.factor,
        moved=moved,
        mode=options.vectors,
        text_encoder=options.text_encoder,
    )


def assemble_adapter(
    adapter: Adapter,
    updates: dict[str, LowRank],
    vectors: CarriedVectors,
    target: Base,
    metadata: dict[str, str],
) -> Adapter:
    """The adapter of the target: its modules, its kernels, its metadata."""
    kernels: dict[str, tuple[int, int]] = {}
    for name in updates:
        shape = target.shapes.get(name, ())
        if len(shape) == 4:
            kernels[name] = (shape[2], shape[3])
    return replace(
        adapter, updates=updates, kernels=kernels, vectors=vectors.vectors, metadata=metadata
    )


def build_metadata(
    adapter: Adapter,
    plan: Plan,
    source: Base,
    target: Base,
    options: Options,
    cache: BasisCache | None = None,
) -> dict[str, str]:
    """The header of the result: the LoRA's own, with the target's names and how it was made."""
    provenance = {
        "version": __version__,
        "method": options.method,
        "strength": f"{options.factor:.4g}",
        "rank_rule": str(options.rank),
        "threshold": str(options.threshold),
        "match": plan.rule,
        "dropped": options.dropped,
        "source": source.name,
        "target": target.name,
    }
    hashes = {
        "source_hash": compute_identity(source, cache),
        "target_hash": compute_identity(target, cache),
    }
    return rewrite_metadata(
        adapter.metadata,
        target_name=target.name,
        target_layout=target.layout,
        target_sha256=compute_sha256(target, cache),
        target_short_hash=compute_short_hash(target),
        provenance=provenance | {key: value for key, value in hashes.items() if value},
    )
