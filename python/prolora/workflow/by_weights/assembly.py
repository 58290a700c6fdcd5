"""What a transfer gives: the adapter of the target, its header, and a row for every module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...adapters.adapter import Adapter
from ...adapters.formats.metadata import rewrite_metadata
from ...adapters.formats.moves import read_moves, write_moves
from ...architectures.modules import is_in_text_encoder
from ...bases import Base
from ...bases.cache.basis_cache import BasisCache
from ...bases.identity import compute_identity, compute_sha256, compute_short_hash
from ...core.lowrank import LowRank
from ...errors import LowCoverage
from ...files.writing import replace_surrogates
from ...version import __version__
from ..module_report import ModuleReport
from ..options import TransferOptions
from ..plan import ModulePlan, Route
from ..report import Report, measure_coverage, split_modules
from .vectors import CarriedVectors, carry_vectors


def describe_unchanged(
    adapter: Adapter, name: str, target: str | None, reason: str, energy: float | None = None
) -> ModuleReport:
    """The row of a module that goes over as it is; its energy ‖ΔW_s‖² may be known already."""
    update = adapter.updates[name]
    if energy is None:
        energy = update.norm().square().item()
    return ModuleReport(
        source=name,
        target=target,
        status="mapped",
        reason=reason,
        shape=tuple(update.shape),
        rank_in=update.rank,
        rank_out=update.rank,
        energy=energy,
    )


def list_unplaced_modules(
    adapter: Adapter, plan: ModulePlan, energies: Mapping[str, float] | None = None
) -> list[ModuleReport]:
    """The rows of the modules that the plan skips or refuses, or that could not be read.

    Args:
        adapter: the LoRA as it came in.
        plan: says why.
        energies: ‖ΔW_s‖² of these modules, as far as it is known.
    """
    rows = []
    for status, reasons in (("skipped", plan.skipped), ("refused", plan.refused)):
        for name, reason in reasons.items():
            row = describe_unchanged(adapter, name, None, reason, (energies or {}).get(name))
            rows.append(replace(row, status=status, rank_out=0))
    return rows + list_unread_modules(adapter)


def list_unread_modules(adapter: Adapter) -> list[ModuleReport]:
    """The rows of modules whose update was not read: it is refused, or has no place here."""
    return [
        ModuleReport(
            source=name,
            target=None,
            status="refused" if name in adapter.refused else "skipped",
            reason=adapter.left_out[name],
            shape=(out, inputs),
            rank_in=rank,
        )
        for name, (out, inputs, rank) in adapter.unread.items()
    ]


def list_missed(adapter: Adapter, options: TransferOptions) -> tuple[str, ...]:
    """The modules whose update could not be read, but for those that are left out as asked."""
    asked = options.text_encoder == "skip"
    return tuple(name for name in adapter.unread if not (asked and is_in_text_encoder(name)))


def list_tensors_left_out(adapter: Adapter) -> dict[str, str]:
    """Tensor of the file that is no update and is not moved -> why."""
    return {n: reason for n, reason in adapter.left_out.items() if n not in adapter.unread}


def describe_summed_module(row: ModuleReport, adapter: Adapter, plan: ModulePlan) -> ModuleReport:
    """The row of a module that others may have been added to, with the rank it had in the LoRA."""
    added = sum(onto == row.source for onto in plan.summed.values())
    if not added:
        return row
    update = adapter.updates.get(row.source)
    reason = f"{row.reason}; updates of dropped blocks added: {added}"
    return replace(row, rank_in=update.rank if update else 0, reason=reason)


def describe_passed_module(
    adapter: Adapter, name: str, energy: float | None = None
) -> ModuleReport:
    """The row of a module of a text encoder that goes over as it is."""
    return describe_unchanged(adapter, name, name, "text encoder, carried over", energy)


def list_summed_modules(
    adapter: Adapter,
    plan: ModulePlan,
    moved: Mapping[str, str],
    energies: Mapping[str, float] | None = None,
) -> list[ModuleReport]:
    """The rows of the modules that were added to others.

    Args:
        adapter: the LoRA as it came in.
        plan: says onto which.
        moved: source module -> target module of all that was moved.
        energies: ‖ΔW_s‖² of the modules, as far as it is known.
    """
    rows = []
    for name, onto in plan.summed.items():
        reason = "its block is gone; added to the update of the nearest that is there"
        energy = (energies or {}).get(name)
        row = describe_unchanged(adapter, name, moved.get(onto), reason, energy)
        row = replace(row, onto=onto, rank_out=0)
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


def outline_rows(
    adapter: Adapter,
    summed: Adapter,
    plan: ModulePlan,
    energies: Mapping[str, float] | None = None,
) -> list[ModuleReport]:
    """A row for every module, as the plan has it: nothing has been moved yet.

    Args:
        adapter: the LoRA as it came in.
        summed: the same, updates of dropped blocks added to those of their neighbours.
        plan: says where each module goes.
        energies: ‖ΔW_s‖² of the modules, as far as it is known.
    """
    known = energies or {}
    rows = list_unplaced_modules(adapter, plan, known)
    for pair in plan.pairs:
        energy = known.get(pair.source)
        row = describe_unchanged(summed, pair.source, pair.target, "would be projected", energy)
        rows.append(describe_summed_module(row, adapter, plan))
    for name in plan.passed:
        rows.append(describe_passed_module(adapter, name, known.get(name)))
    moved = {pair.source: pair.target for pair in plan.pairs}
    return rows + list_summed_modules(adapter, plan, moved, known)


def check_planned_coverage(
    adapter: Adapter, summed: Adapter, plan: ModulePlan, minimum: float
) -> None:
    """`check_coverage` before anything is moved: weights can only lower what the plan allows.

    Raises:
        LowCoverage: fewer modules have a place than was asked for.
    """
    unmeasured = dict.fromkeys((*adapter.updates, *summed.updates), 0.0)
    check_coverage(outline_rows(adapter, summed, plan, unmeasured), minimum)


def check_coverage(
    rows: Sequence[ModuleReport], minimum: float, threshold: float | None = None
) -> None:
    """Refuses a transfer that too few modules of the LoRA take part in.

    Args:
        rows: of all its modules.
        minimum: the least share of them that must have a place.
        threshold: on Φ, once it has decided; None before a weight is looked at.

    Raises:
        LowCoverage: fewer modules have a place than was asked for.
    """
    coverage = measure_coverage(rows)
    if coverage >= minimum:
        return
    names, placed = split_modules(rows)
    text = (
        f"{len(placed)} of {len(names)} modules find a place on the target "
        f"(coverage {coverage:.2f}), fewer than the coverage {minimum:g} that was asked for"
    )
    if threshold is not None:
        text += (
            f", after the threshold {threshold:g} on Φ, and without pairs that have nothing in "
            "common; lower the threshold, or try method copy"
        )
    raise LowCoverage(f"{text}; nothing written")


def outline_result(summed: Adapter, route: Route) -> Adapter:
    """What the adapter of the target will consist of, before anything is moved.

    Args:
        summed: the LoRA, updates of dropped blocks added to those of their neighbours.
        route: where it goes.
    """
    updates = {pair.target: summed.updates[pair.source] for pair in route.plan.pairs}
    updates |= {name: summed.updates[name] for name in route.plan.passed}
    vectors = carry_vectors(replace(route, adapter=summed))
    return assemble_adapter(summed, updates, vectors, route.target, summed.metadata)


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
        adapter,
        updates=updates,
        kernels=kernels,
        vectors=vectors.vectors,
        family=target.family or adapter.family,
        metadata=metadata,
        unread={},
    )


def build_metadata(route: Route, cache: BasisCache | None = None) -> dict[str, str]:
    """The header of the result: the LoRA's own, with the target's names and how it was made.

    Reads all bytes of the bases, for their hashes.
    """
    source, target, options = route.source, route.target, route.options
    provenance = {
        "version": __version__,
        "method": options.method,
        "strength": f"{options.factor:.4g}",
        "rank_rule": str(options.rank),
        "threshold": str(options.threshold),
        "match": route.plan.rule,
        "dropped": options.dropped,
        "source": source.name,
        "target": target.name,
        **write_moves(read_moves(route.adapter.metadata)),
    }
    hashes = {
        "source_hash": compute_identity(source, cache),
        "target_hash": compute_identity(target, cache),
    }
    metadata = rewrite_metadata(
        route.adapter.metadata,
        target_name=target.name,
        target_layout=target.layout,
        target_sha256=compute_sha256(target, cache),
        target_short_hash=compute_short_hash(target),
        provenance=provenance | {key: value for key, value in hashes.items() if value},
    )
    # Names of files need not be text, which a header must be.
    return {replace_surrogates(key): replace_surrogates(x) for key, x in metadata.items()}


def build_report(
    route: Route, modules: Sequence[ModuleReport], vectors: CarriedVectors, **known: Any
) -> Report:
    """The report of a transfer by weights.

    Args:
        route: of the LoRA, the method decided.
        modules: a row for every module of the LoRA, and one for each further target.
        vectors: what became of biases and normalisation layers.
        **known: further fields of `Report`.
    """
    adapter, plan, options = route.adapter, route.plan, route.options
    return Report(
        method=options.method,
        rank_rule=options.rank,
        threshold=options.threshold,
        match=plan.rule,
        source=route.source.name,
        target=route.target.name,
        modules=tuple(modules),
        decisions=plan.decisions,
        dropped_blocks=plan.dropped,
        renumbered=dict(plan.renumbered),
        vectors=len(vectors.vectors),
        left_out=list_tensors_left_out(adapter) | vectors.left_out,
        unread=list_missed(adapter, options),
        kept_energy=dict(adapter.kept_energy),
        strength=options.factor,
        **known,
    )
