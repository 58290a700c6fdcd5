"""What a projection kept and lost, from small Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .methods import Parts, Side
from .projectors import AnyBasis
from .short_text import format_range
from .subspaces import Similarity, basis_similarity


@dataclass(frozen=True, repr=False)
class ProjectionInfo:
    """What a projection kept and lost, one value per matrix: [...], shares and norms in float64.

    Where several updates of each weight were moved at once, those that depend on the update are
    [..., l].

    Attributes:
        shape: (m, n) of one update, as its axes were read: of [out, in, k] they are (in, k), since
            three axes are a stack.
        similarity: Φ left and right, with chance levels.
        rank_source: columns of the source basis.
        rank_target: columns of the target basis.
        range_energy: share of ‖ΔW_s‖² in the source's range on both sides.
        null_energy: … in the complement on both sides.
        range_null_energy: … written to the range, read from the complement (a mixed block).
        null_range_energy: … written to the complement, read from the range (the other one).
        energy: ‖ΔW_s‖².
        surviving_energy: ‖ΔW_t‖² / ‖ΔW_s‖².
        norm_ratio: ‖ΔW_t‖ / ‖ΔW_s‖.
        copy_distance: ‖ΔW_t − ΔW_s‖ / ‖ΔW_s‖: 0 where the method does what copying does.
        bound: the larger of the two bases' bounds on the sine of the largest principal angle.
        ok: both bases met their tolerance.
    """

    shape: tuple[int, int]
    similarity: Similarity
    rank_source: Tensor
    rank_target: Tensor
    range_energy: Tensor
    null_energy: Tensor
    range_null_energy: Tensor
    null_range_energy: Tensor
    energy: Tensor
    surviving_energy: Tensor
    norm_ratio: Tensor
    copy_distance: Tensor
    bound: Tensor
    ok: Tensor

    def __repr__(self) -> str:
        """Writes ProjectionInfo(3 × [8, 6], energy kept 0.59, 0.64 norms from the copy, …)."""
        energy, distance, bound = (
            format_range(self.surviving_energy, ".2f"),
            format_range(self.copy_distance, ".2f"),
            format_range(self.bound, ".0e"),
        )
        count = f"{self.energy.numel()} × " if self.energy.ndim else ""
        return (
            f"ProjectionInfo({count}{[*self.shape]}, energy kept {energy}, {distance} norms from "
            f"the copy, bound {bound})"
        )

    def squeeze(self) -> ProjectionInfo:
        """Removes the first axis of a stack of one."""
        similar = Similarity(*(x.squeeze(0) for x in self.similarity.__dict__.values()))
        numbers = {x: y.squeeze(0) for x, y in self.__dict__.items() if isinstance(y, Tensor)}
        return ProjectionInfo(shape=self.shape, similarity=similar, **numbers)


@dataclass(frozen=True)
class Grams:
    """Inner products of a factor's rows before and after a move, float64.

    Both the account and the recompression need them.
    """

    x: Tensor  # XXᵀ [..., r, r] of the factor as it came
    rows: Parts  # the parts that a method made of it, [..., r, m] each
    parts: Parts  # YYᵀ of each part Y
    cross: Parts  # YXᵀ of each

    @classmethod
    def of(cls, side: Side, moved: Parts) -> Grams:
        """Computes the inner products of one side."""
        x = side.x.double()
        rows = tuple(part.double() for part in moved)
        return cls(x @ x.mT, rows, tuple(y @ y.mT for y in rows), tuple(y @ x.mT for y in rows))


def measure_projection(
    sides: tuple[Side, Side],
    grams: tuple[Grams, Grams],
    bases: tuple[AnyBasis, AnyBasis],
    similar: Similarity | None = None,
) -> ProjectionInfo:
    """Measures what was kept and lost, from r×r Gram matrices.

    ‖XᵀY‖² = tr((XXᵀ)(YYᵀ)). Distances are differences of large numbers and need float64; shares of
    the energy do not.

    The Gram matrices are of the rows of both sides, and of what a method made of them; `similar` is
    the overlap of the bases, where it is known already.
    """
    (left, right), (up, down), (source, target) = sides, grams, bases
    before = _inner_product(up.x, down.x)
    # Parts are orthogonal to each other on either side, so no product of two counts.
    after = _sum_terms([_inner_product(u, d) for u, d in zip(up.parts, down.parts, strict=True)])
    cross = _sum_terms([_inner_product(u, d) for u, d in zip(up.cross, down.cross, strict=True)])
    distance = (after + before - 2 * cross).clamp_min(0)
    safe = torch.where(before > 0, before, 1.0)
    within, without = (
        [(rows @ rows.mT).double() for rows in part]
        for part in ((left.inside, right.inside), (left.outside, right.outside))
    )

    def share(of_left: Tensor, of_right: Tensor) -> Tensor:
        return _inner_product(of_left, of_right) / safe

    return ProjectionInfo(
        shape=(left.x.shape[-1], right.x.shape[-1]),
        similarity=similar or basis_similarity(source, target),
        rank_source=source.rank,
        rank_target=target.rank,
        range_energy=share(within[0], within[1]),
        null_energy=share(without[0], without[1]),
        range_null_energy=share(within[0], without[1]),
        null_range_energy=share(without[0], within[1]),
        energy=before,
        surviving_energy=after / safe,
        norm_ratio=(after / safe).sqrt(),
        copy_distance=(distance / safe).sqrt(),
        bound=torch.maximum(source.bound, target.bound),
        ok=source.ok & target.ok,
    )


def _inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns ⟨L, R⟩ [...] of two Gram matrices, negative only by rounding."""
    return (left * right).sum((-2, -1)).clamp_min(0)


def _sum_terms(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(0)
