"""How two base models relate, from their weights alone: before any LoRA is moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .bases import Base, open_base
from .bases.modules import is_adaptable, matrix_shape, place
from .errors import UnsupportedFormat
from .linalg.basis import truncated_svd
from .linalg.subspaces import basis_similarity
from .linalg.triplets import Rank
from .pairing import Match, feeds
from .projection import DEFAULT_RANK
from .report import finite


@dataclass(frozen=True)
class ModuleComparison:
    """One pair of weights.

    Attributes:
        source, target: module names.
        shape: out × in.
        phi_left, phi_right, chance_left, chance_right, above_left, above_right: overlap of the
            leading subspaces, see `linalg.subspaces.Similarity`.
        drift: ‖W_t − W_s‖_F / ‖W_s‖_F; about √2 for unrelated weights of equal norm.
        columns_source, columns_target: k of the bases.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    phi_left: float
    phi_right: float
    chance_left: float
    chance_right: float
    above_left: float
    above_right: float
    drift: float
    columns_source: int
    columns_target: int

    @property
    def place(self) -> str:
        """The part of the model: `down_blocks.1`, `mid_block`, … or the first name element."""
        return place(self.target)


@dataclass(frozen=True)
class Comparison:
    """Two bases, module by module.

    Attributes:
        source, target: their names.
        match: how modules were paired.
        modules: the pairs of equal shape.
        without_partner: adaptable source modules that no target module takes.
        other_shape: pairs whose widths differ.
    """

    source: str
    target: str
    match: str
    modules: list[ModuleComparison]
    without_partner: int
    other_shape: int

    def mean(self, field: str) -> float:
        """The mean of a number of `ModuleComparison` over the pairs where it is defined."""
        values = torch.tensor([getattr(module, field) for module in self.modules])
        return float(values.double().nanmean()) if len(values) else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON (NaN as None)."""
        numbers = ("phi_left", "phi_right", "above_left", "above_right", "drift")
        means = {field: self.mean(field) for field in numbers}
        fields: dict[str, Any] = finite(asdict(self) | {"means": means})
        return fields


def compare(
    source: Any,
    target: Any,
    *,
    rank: Rank = DEFAULT_RANK,
    match: Match = "name",
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Measures overlap and drift of every adaptable pair of weights.

    Args:
        source: base model as `transfer` takes it.
        target: base model.
        rank: columns, or share of energy, of the subspaces compared.
        match: how modules are paired, as in `transfer`.
        device: where to compute; None means the CPU.
        progress: called as progress(done, total, name).

    Raises:
        UnsupportedFormat: the two bases share no adaptable module of equal shape.
    """
    source, target = open_base(source), open_base(target)
    partners, rule = feeds(source, target, match)
    partners = {t: s for t, s in partners.items() if is_adaptable(t)}
    taken = set(partners.values())
    alone = sum(1 for name in source.shapes if is_adaptable(name) and name not in taken)
    equal = {
        t: s
        for t, s in partners.items()
        if matrix_shape(source.shapes[s]) == matrix_shape(target.shapes[t])
    }
    if not equal:
        raise UnsupportedFormat(
            f"{source.name} and {target.name} have no attention or feed-forward module of equal "
            "name and shape: weights alone cannot relate them"
        )
    rows = []
    for done, (module, origin) in enumerate(equal.items(), 1):
        rows.append(_compare_module(source, origin, target, module, rank, device))
        if progress:
            progress(done, len(equal), module)
    other = len(partners) - len(equal)
    return Comparison(source.name, target.name, rule, rows, alone, other)


def _compare_module(
    source: Base, origin: str, target: Base, module: str, rank: Rank, device: str | None
) -> ModuleComparison:
    """One pair."""
    shape = matrix_shape(target.shapes[module])
    ours = source.read(origin).reshape(shape).to(device)
    theirs = target.read(module).reshape(shape).to(device)
    bases = [truncated_svd(weight, rank) for weight in (ours, theirs)]
    similar = basis_similarity(*bases)
    distance = (theirs.double() - ours.double()).norm()
    return ModuleComparison(
        source=origin, target=module, shape=shape,
        phi_left=similar.left.item(), phi_right=similar.right.item(),
        chance_left=similar.chance_left.item(), chance_right=similar.chance_right.item(),
        above_left=similar.above_left.item(), above_right=similar.above_right.item(),
        drift=(distance / ours.double().norm().clamp_min(1e-300)).item(),
        columns_source=int(bases[0].rank), columns_target=int(bases[1].rank),
    )  # fmt: skip
