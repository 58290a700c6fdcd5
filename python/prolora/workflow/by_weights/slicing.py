"""A narrower target that kept rows and columns of the source: the LoRA's factors are cut alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...adapters.adapter import Adapter
from ...bases import Base
from ...comparison.width_selection import Selection, select_base
from ..module_report import ModuleReport
from ..plan import ModulePlan


def slice_adapter(adapter: Adapter, plan: ModulePlan) -> Adapter:
    """The adapter with the rows and columns of its updates that the target has: B[rows]·A[:, cols].

    Biases of these modules lose the same rows.
    """
    if not plan.selections:
        return adapter
    updates = dict(adapter.updates)
    vectors = dict(adapter.vectors)
    for name, selection in plan.selections.items():
        if name in updates:
            updates[name] = selection.take_update(updates[name])
        bias = vectors.get(f"{name}.bias")
        if bias is not None and len(bias) == selection.shape[0]:
            vectors[f"{name}.bias"] = bias[selection.rows]
    return replace(adapter, updates=updates, vectors=vectors)


def slice_source(source: Base, plans: Iterable[ModulePlan]) -> Base:
    """The source as the sliced updates of several LoRAs meet it: with weights of their shapes."""
    selections: dict[str, Selection] = {}
    for plan in plans:
        selections |= plan.selections
    return select_base(source, selections)


def measure_sliced(adapter: Adapter, plan: ModulePlan) -> dict[str, float]:
    """‖ΔW_s‖² of the updates that will be sliced, all rows and columns of them."""
    return {
        name: adapter.updates[name].norm().square().item()
        for name in plan.selections
        if name in adapter.updates
    }


def describe_sliced_module(
    row: ModuleReport, plan: ModulePlan, energies: Mapping[str, float]
) -> ModuleReport:
    """The row of a module that may have been sliced: what was cut off counts as lost.

    Args:
        row: of the sliced update.
        plan: says what was sliced.
        energies: ‖ΔW_s‖² of the whole updates.
    """
    selection, whole = plan.selections.get(row.source), energies.get(row.source)
    if selection is None:
        return row
    row = replace(row, residual=selection.residual)
    if row.status == "mapped":
        row = replace(row, reason=f"{row.reason}; {selection.describe()}")
    if not whole:
        return row
    share = row.energy / whole
    return replace(
        row,
        energy=whole,
        surviving_energy=row.surviving_energy * share,
        norm_ratio=row.norm_ratio * math.sqrt(share),
    )
