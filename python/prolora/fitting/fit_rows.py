"""What became of every module of a fitted LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.formats.moves import read_moves
from ..bases import Base
from ..core.lowrank import LowRank
from ..core.merging import subtract_updates
from ..moving.options import FIT
from ..moving.plan import ModulePlan
from ..moving.rows import (
    describe_unchanged,
    list_missed,
    list_tensors_left_out,
    list_unread_modules,
)
from ..reports.module_report import ModuleReport
from .fit_options import FitOptions
from .fit_plan import LoraParts, foresee_work, target_modules
from .fit_report import FitReport

_VECTOR = "a fit gives updates of matrices only, no biases or normalisation layers"


def outline_report(
    adapter: Adapter, plan: ModulePlan, source: Base, target: Base, options: FitOptions
) -> FitReport:
    """Reports what would be fitted, from names and shapes alone."""
    modules = target_modules(adapter, source, target)
    rows = list_modules(adapter, plan, dict.fromkeys(modules), "would be fitted")
    own = LoraParts.of(adapter, source, target, options.text_encoder).denoiser.updates.values()
    rank = max((update.rank for update in own), default=0) if options.rank is None else options.rank
    if rank >= 1:  # a share becomes a rank once the updates are fitted
        for i, row in enumerate(rows):
            if row.target in modules:
                m, *n = modules[row.target]
                rows[i] = replace(row, rank_out=min(int(rank), m, math.prod(n)))
    work = foresee_work(source, target, options).sentence(source.name, target.name)
    return build_fit_report(adapter, source, target, options, rows, work=work, dry_run=True)


def build_fit_report(
    adapter: Adapter,
    source: Base,
    target: Base,
    options: FitOptions,
    rows: Iterable[ModuleReport],
    **known: Any,
) -> FitReport:
    """Builds the report of a fit; `known` are further fields of the report."""
    return FitReport(
        method=FIT,
        rank_rule=options.rank or 0,
        source=source.name,
        target=target.name,
        modules=tuple(rows),
        left_out=dict.fromkeys(adapter.vectors, _VECTOR) | list_tensors_left_out(adapter),
        unread=list_missed(adapter, options.text_encoder),
        moves=read_moves(adapter.metadata),
        **known,
    )


def list_modules(
    adapter: Adapter, plan: ModulePlan, updates: Mapping[str, LowRank | None], how: str
) -> list[ModuleReport]:
    """Lists what became of every LoRA module, and further target modules.

    `updates` is target module -> update, None where it is not yet known; `how` describes a fitted
    module.
    """
    rows = [_describe_module(adapter, name, plan, updates, how) for name in adapter.updates]
    for name, update in updates.items():
        if name not in adapter.updates:
            rows.append(_describe_further_module(name, update, how))
    return rows + list_unread_modules(adapter)


def _describe_module(
    adapter: Adapter, name: str, plan: ModulePlan, updates: Mapping[str, LowRank | None], how: str
) -> ModuleReport:
    """Makes the row of a module of the LoRA."""
    row = describe_unchanged(adapter, name, name, "text encoder, carried over unchanged")
    if name in plan.skipped:
        return replace(row, target=None, status="skipped", reason=plan.skipped[name], rank_out=0)
    if name in plan.passed:
        return row
    return _describe_fitted_module(row, adapter.updates[name], updates, how)


def _describe_further_module(name: str, update: LowRank | None, how: str) -> ModuleReport:
    """Makes the row of a target module that the LoRA lacks: rank 0."""
    return ModuleReport(
        source=name,
        target=name,
        status="mapped",
        reason=f"{how}; the LoRA has no module of that name",
        shape=tuple(update.shape) if update else (),
        rank_in=0,
        rank_out=update.rank if update else 0,
        surviving_energy=math.nan,
        norm_ratio=math.nan,
        copy_distance=math.nan,
    )


def _describe_fitted_module(
    row: ModuleReport, update: LowRank, updates: Mapping[str, LowRank | None], how: str
) -> ModuleReport:
    """Describes a fitted module, compared with its twin if any."""
    twin = updates.get(row.source)
    row = replace(
        row,
        reason=how,
        rank_out=twin.rank if twin else 0,
        surviving_energy=math.nan,
        norm_ratio=math.nan,
        copy_distance=math.nan,
    )
    if row.source not in updates:
        # The target has fewer blocks: its own were fitted to what this module does.
        return replace(row, target=None, reason=f"{how}; the target has no module of that name")
    norm = float(update.norm())
    if twin is None or tuple(twin.shape) != tuple(update.shape) or not norm:
        return row
    ratio = float(twin.norm()) / norm
    return replace(
        row,
        surviving_energy=ratio**2,
        norm_ratio=ratio,
        copy_distance=float(subtract_updates(twin, update).norm()) / norm,
    )
