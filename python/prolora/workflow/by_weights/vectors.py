"""Trained biases and normalisation layers on their way to the target: carried over, not projected.

A vector has no singular subspaces. It lives in the output (a bias) or the channels (a norm) of a
module whose weights were paired, and goes where they went, times the strength of the transfer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ...adapters.adapter import Adapter
from ...architectures.modules import is_in_text_encoder
from ...bases import Base
from ..plan import Plan


@dataclass
class CarriedVectors:
    """What became of an adapter's vectors.

    Attributes:
        vectors: of the target, "module.bias" or "module.weight" -> what is added.
        left_out: vector of the adapter -> why it has no place.
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def carry_vectors(
    adapter: Adapter,
    plan: Plan,
    source: Base,
    target: Base,
    *,
    factor: float = 1.0,
    moved: Collection[str] | None = None,
    mode: str = "copy",
    text_encoder: str = "copy",
) -> CarriedVectors:
    """Places the vectors of an adapter on the target.

    Args:
        adapter: whose.
        plan: where its modules go.
        source: the base of the adapter.
        target: the base they go to.
        factor: strength of the transfer.
        moved: target modules that got an update; a bias stays with its module. None: all of them.
        mode: "copy", or "skip" to leave all of them out.
        text_encoder: "skip" leaves out those of text encoders; otherwise they stay as they are.
    """
    found = CarriedVectors()
    for name, vector in adapter.vectors.items():
        module, _, tensor = name.rpartition(".")
        if mode == "skip":
            found.left_out[name] = "a trained bias or normalisation layer, left out as asked"
            continue
        if is_in_text_encoder(module):
            places, reason = _in_text_encoder(module, plan, text_encoder)
            strength = 1.0
        else:
            strength = factor
            places = list(_find_partners(module, len(vector), plan, source, target))
            reason = "the target has no such module of that width"
            if moved is not None and module in adapter.updates and places:
                places = [place for place in places if place in moved]
                reason = "the update of its module was left out"
        for place in places:
            found.vectors[f"{place}.{tensor}"] = vector if strength == 1 else vector * strength
        if not places:
            found.left_out[name] = f"a trained bias or normalisation layer: {reason}"
    return found


def _in_text_encoder(module: str, plan: Plan, mode: str) -> tuple[list[str], str]:
    """Vectors of a text encoder are carried over where its updates are."""
    if mode == "skip":
        return [], "text encoder, left out as asked"
    encoder = module.partition(".")[0] + "."
    for name, reason in plan.skipped.items():
        if name.startswith(encoder):
            return [], reason
    return [module], ""


def _find_partners(
    module: str, width: int, plan: Plan, source: Base, target: Base
) -> Iterator[str]:
    """The target's modules that `module` became: through its own weight, else its siblings'.

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
