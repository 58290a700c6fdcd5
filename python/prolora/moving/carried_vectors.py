"""Trained biases and normalisation layers on their way to the target: carried over, not projected.

A vector has no singular subspaces. It lives in the output (a bias) or the channels (a norm) of a
module whose weights were paired, and goes where they went, times the strength of the transfer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ..architectures.modules import is_in_text_encoder
from ..bases import Base
from ..reports.module_report import LEFT_OUT
from .ledger import Ledger
from .plan import ModulePlan

A_VECTOR = "a trained bias or normalisation layer"
"""How reasons begin for which such a tensor stays behind."""


@dataclass
class CarriedVectors:
    """What became of an adapter's vectors."""

    # Of the target, "module.bias" or "module.weight" -> what is added
    vectors: dict[str, Tensor] = field(default_factory=dict)
    # Vector of the adapter -> why it has no counterpart
    left_out: dict[str, str] = field(default_factory=dict)


def carry_vectors(ledger: Ledger, moved: Collection[str] | None = None) -> CarriedVectors:
    """Moves the vectors of an adapter to the target.

    A text encoder's stay as they are; all others are multiplied by the strength. `moved` are target
    modules that got an update; a bias stays behind with its module. None: as if every module of the
    plan got one.
    """
    carried = CarriedVectors()
    for name, vector in ledger.adapter.vectors.items():
        module, _, tensor = name.rpartition(".")
        places, reason = _find_places(ledger, module, len(vector), moved)
        if not places:
            carried.left_out[name] = reason
        strength = 1.0 if is_in_text_encoder(module) else ledger.options.strength
        if places and all(ledger.block_factors.get(place) == 0 for place in places):
            carried.left_out[name] = f"{A_VECTOR}: {LEFT_OUT}"
            places = []
        for place in places:
            scaled = vector if strength == 1 else vector * strength
            carried.vectors[f"{place}.{tensor}"] = scaled
    return carried


def _find_places(
    ledger: Ledger, module: str, width: int, moved: Collection[str] | None
) -> tuple[list[str], str]:
    """Returns the target modules for a vector, or why there are none."""
    if ledger.options.vectors == "skip":
        return [], f"{A_VECTOR}, left out as asked"
    if is_in_text_encoder(module):
        return _find_text_encoder(module, ledger)
    places = list(_find_partners(module, width, ledger.plan, ledger.source, ledger.target))
    if not places:
        return [], f"{A_VECTOR}: the target has no such module of that width"
    if moved is not None and any(row.source == module for row in ledger.rows.values()):
        places = [place for place in places if place in moved]
    return places, f"{A_VECTOR}: the update of its module was left out"


def _find_text_encoder(module: str, ledger: Ledger) -> tuple[list[str], str]:
    """Returns the module itself: a text encoder's vectors follow its updates."""
    if ledger.options.text_encoder == "skip":
        return [], f"{A_VECTOR}: text encoder, left out as asked"
    encoder = module.partition(".")[0] + "."
    for name, reason in ledger.plan.skipped.items():
        if name.startswith(encoder):
            return [], f"{A_VECTOR}: {reason}"
    return [module], ""


def _find_partners(
    module: str, width: int, plan: ModulePlan, source: Base, target: Base
) -> Iterator[str]:
    """Yields the target's modules for `module`, by its weight or its siblings'.

    Norms have no weight matrix, and go where the matrices of the same block went: `norm1` beside
    `attn1.to_q`, `norm` beside `proj_in`.
    """
    if module in source.shapes:
        for partner, origin in plan.table.items():
            same = origin == module and source.shapes[origin] == target.shapes[partner]
            if same and target.shapes[partner][0] == width:
                yield partner
        return
    block, dot, leaf = module.rpartition(".")
    seen = set()
    for partner, origin in plan.table.items():
        rest = origin.removeprefix(block + dot)
        beside = origin.startswith(block + dot) and partner.endswith(rest)
        shape = target.shapes[partner]
        if beside and source.shapes[origin] == shape and width in shape[:2]:
            place = f"{partner.removesuffix(rest)}{leaf}"
            if place not in seen:
                seen.add(place)
                yield place
