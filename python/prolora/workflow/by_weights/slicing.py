"""A narrower target that kept rows and columns of the source: the LoRA's factors are cut alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ...adapters.adapter import Adapter
from ...bases import Base
from ...comparison.width_selection import Selection, select_base
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
