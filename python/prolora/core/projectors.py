"""Orthogonal projectors onto the leading singular subspaces of weights.

A projector is stored by the columns on one side of the cut: P = UUᵀ by those that are kept, or
P = I − CCᵀ by those that are left out. `project`, `similarity` and `transfer` need no more. At the
default rank the second is several times smaller, and faster to compute (svd/smaller_side.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .basis import Basis, truncated_svd
from .parallel import map_on_threads
from .precision import EPS
from .rank_rule import Rank
from .svd import krylov
from .svd.few_columns import energy_triplets
from .svd.smaller_side import CutSide, find_side, solves_sides
from .svd.solvers import try_solver
from .svd.stacks import chunk_size, take_places
from .svd.triplets import Triplets

# A bound on the sine up to which the smaller side is used. It is reached by all but degenerate
# spectra; a tenth of `truncated_svd`'s tolerance, because tiny weights with a tiny gap would
# otherwise lose more digits than LAPACK in float32 does.
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class RowSpace:
    """The row space of wide weights w [b, d, n] of full rank: R = wᵀ (wwᵀ)⁻¹ w."""

    w: Tensor  # [b, d, n], float64
    factor: Tensor  # [b, d, d], Cholesky factor of wwᵀ, lower

    def project(self, x: Tensor) -> Tensor:
        """Returns the rows x [b, r, n] inside the row space."""
        inner = torch.cholesky_solve(self.w @ x.double().mT, self.factor)
        return (inner.mT @ self.w).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Projector:
    """Projectors of one side of a stack of weights.

    Attributes:
        rows: [b, c, m], orthonormal; zero beyond the number of each matrix.
        leading: bool [b], whether the rows span the range, or are what is left out of it.
        number: int64 [b], rows in use.
        row_space: if given, the range lies within it, and the rows are left out of it.
    """

    rows: Tensor
    leading: Tensor
    number: Tensor
    row_space: RowSpace | None = None

    @cached_property
    def _kinds(self) -> set[bool]:
        return set(self.leading.tolist())

    def inside(self, x: Tensor) -> Tensor:
        """Returns the part of rows x [b, r, m] in the range; its error is relative to x."""
        near = x @ self.rows.mT
        if False not in self._kinds:
            return near @ self.rows
        if self.row_space is not None:
            return self.row_space.project(x) - near @ self.rows
        if True not in self._kinds:
            return torch.baddbmm(x, near, self.rows, alpha=-1)
        near = near @ self.rows
        return torch.where(self.leading[:, None, None], near, x - near)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Splits rows x [b, r, m] into their parts in the range and in its complement.

        The larger part of a cancellation is projected twice, so that both parts are orthogonal to
        each other even if one of them is tiny.
        """
        if self.row_space is not None:
            inside = self.inside(x)
            return inside, x - inside
        near = (x @ self.rows.mT) @ self.rows
        rest = x - near
        more = (rest @ self.rows.mT) @ self.rows
        near, rest = near + more, rest - more
        if False not in self._kinds:
            return near, rest
        if True not in self._kinds:
            return rest, near
        choice = self.leading[:, None, None]
        return torch.where(choice, near, rest), torch.where(choice, rest, near)

    def overlap(self, other: Projector) -> Tensor:
        """Returns tr(P₁P₂) [b] in float64: the sum of the squared cosines of all angles."""
        shared = torch.linalg.vector_norm(
            self.rows @ other.rows.mT, dim=(1, 2), dtype=torch.float64
        ).square()
        one, two = self.number, other.number
        of_leading = torch.where(other.leading, shared, one - shared)
        of_rest = torch.where(other.leading, two - shared, self.rows.shape[-1] - one - two + shared)
        return torch.where(self.leading, of_leading, of_rest).clamp_min(0)

    def to(self, where: torch.dtype | torch.device | str) -> Projector:
        """Casts the rows to a dtype, or moves every tensor to a device."""
        if isinstance(where, torch.dtype):
            return replace(self, rows=self.rows.to(where))
        leading, number = self.leading.to(where), self.number.to(where)
        return Projector(self.rows.to(where), leading, number, self.row_space)

    def __getitem__(self, some: slice) -> Projector:
        """Returns a view of neighbours in the stack."""
        space = self.row_space
        if space is not None:
            space = RowSpace(space.w[some], space.factor[some])
        return Projector(self.rows[some], self.leading[some], self.number[some], space)

    def take(self, places: Sequence[int]) -> Projector:
        """Selects matrices of the stack."""
        rows, leading, number = (
            take_places(x, list(places)) for x in (self.rows, self.leading, self.number)
        )
        space = self.row_space
        if space is not None:
            w, factor = (take_places(x, list(places)) for x in (space.w, space.factor))
            space = RowSpace(w, factor)
        return Projector(rows, leading, number, space)

    def expand(self, b: int) -> Projector:
        """Repeats a stack of one weight b times, without a copy."""
        if len(self.rows) == b:
            return self
        space = self.row_space
        if space is not None:
            space = RowSpace(space.w.expand(b, -1, -1), space.factor.expand(b, -1, -1))
        leading, number = self.leading.expand(b), self.number.expand(b)
        return Projector(self.rows.expand(b, -1, -1), leading, number, space)


@dataclass(frozen=True, eq=False)
class Projectors:
    """Projectors onto the leading singular subspaces of a stack of weights [b, m, n].

    Attributes:
        left: onto the column spaces, [b, m, m].
        right: onto the row spaces, [b, n, n].
        rank: int64 [b], columns that are kept.
        bound: [b], upper bound on the sine of the largest principal angle, as of a `Basis`.
        ok: bool [b], as of a `Basis`.
        solvers: the algorithm of each matrix.
    """

    left: Projector
    right: Projector
    rank: Tensor
    bound: Tensor
    ok: Tensor
    solvers: tuple[str, ...]

    @property
    def shape(self) -> torch.Size:
        """[b, m, n] of the weights."""
        return torch.Size((len(self.rank), self.left.rows.shape[-1], self.right.rows.shape[-1]))

    @classmethod
    def of_basis(cls, basis: Basis) -> Projectors:
        """The projectors of a basis of one weight or of a stack."""
        rank = basis.rank.flatten()
        leading = torch.ones_like(rank, dtype=torch.bool)
        sides = (x.reshape(-1, *x.shape[-2:]).mT for x in (basis.U, basis.V))
        left, right = (Projector(rows, leading, rank) for rows in sides)
        return cls(left, right, rank, basis.bound.flatten(), basis.ok.flatten(), basis.solvers)

    @classmethod
    def of_triplets(cls, triplets: Triplets, wide: bool) -> Projectors:
        """The projectors of leading triplets of weights, or of tall ones transposed."""
        leading = torch.ones_like(triplets.count, dtype=torch.bool)
        sides = [Projector(x.mT, leading, triplets.count) for x in (triplets.short, triplets.long)]
        left, right = sides if wide else sides[::-1]
        ok = triplets.angle <= TOLERANCE
        return cls(left, right, triplets.count, triplets.angle, ok, triplets.solvers)

    def to(self, where: torch.dtype | torch.device | str) -> Projectors:
        """Casts the rows to a dtype, or moves every tensor to a device."""
        if isinstance(where, torch.dtype):
            return replace(self, left=self.left.to(where), right=self.right.to(where))
        names = ("left", "right", "rank", "bound", "ok")
        return replace(self, **{name: getattr(self, name).to(where) for name in names})

    def take(self, places: Sequence[int]) -> Projectors:
        """Selects matrices of the stack."""
        if list(places) == list(range(len(self.rank))):
            return self
        facts = {x: take_places(getattr(self, x), list(places)) for x in ("rank", "bound", "ok")}
        left, right = self.left.take(places), self.right.take(places)
        return Projectors(left, right, **facts, solvers=tuple(self.solvers[i] for i in places))

    def __getitem__(self, i: int) -> Projectors:
        """Returns the stack of one matrix, without its unused rows."""
        one = self.narrow(i, 1)
        c = int(one.left.number)
        left, right = (replace(x, rows=x.rows[:, :c]) for x in (one.left, one.right))
        return replace(one, left=left, right=right)

    def narrow(self, start: int, length: int) -> Projectors:
        """Returns a view of `length` neighbours in the stack."""
        if length == len(self.rank):
            return self
        some = slice(start, start + length)
        names = ("left", "right", "rank", "bound", "ok")
        fields = {name: getattr(self, name)[some] for name in names}
        return Projectors(**fields, solvers=self.solvers[some])

    def expand(self, b: int) -> Projectors:
        """Repeats a stack of one weight b times, without a copy."""
        if len(self.rank) == b:
            return self
        fields = {x: getattr(self, x).expand(b) for x in ("left", "right", "rank", "bound", "ok")}
        return Projectors(**fields, solvers=self.solvers * b)


def join_projectors(parts: Sequence[Projectors], places: Sequence[int] | None = None) -> Projectors:
    """Joins parts of a stack; `places` are the indices that their matrices have in it."""
    if len(parts) == 1 and places is None:
        return parts[0]
    facts = {x: torch.cat([getattr(part, x) for part in parts]) for x in ("rank", "bound", "ok")}
    sides = {x: _join_sides([getattr(part, x) for part in parts]) for x in ("left", "right")}
    left, right = sides["left"], sides["right"]
    joined = Projectors(left, right, **facts, solvers=sum((part.solvers for part in parts), ()))
    if places is None:
        return joined
    return joined.take(sorted(range(len(places)), key=places.__getitem__))


def _join_sides(sides: Sequence[Projector]) -> Projector:
    """Joins projectors, with rows padded to one number."""
    c = max(side.rows.shape[1] for side in sides)
    rows = [torch.nn.functional.pad(x.rows, (0, 0, 0, c - x.rows.shape[1])) for x in sides]
    spaces = [side.row_space for side in sides if side.row_space is not None]
    space = None
    if spaces:
        space = RowSpace(torch.cat([x.w for x in spaces]), torch.cat([x.factor for x in spaces]))
    leading, number = (torch.cat([getattr(x, y) for x in sides]) for y in ("leading", "number"))
    return Projector(torch.cat(rows), leading, number, space)


def find_projectors(
    stacks: Sequence[Tensor], rank: Rank, *, explicit: bool = True
) -> list[Projectors]:
    """Computes the projectors of stacks of finite weights [b, m, n].

    Args:
        stacks: any float dtype, one shape [m, n], without gradient.
        rank: as `truncated_svd` takes it.
        explicit: False allows a `RowSpace` for weights that are not square: it refers to the
            weights, and has no overlap.

    Raises:
        SolverFailure: as `truncated_svd`.
    """
    if not all(_suits(stack, rank) for stack in stacks):
        return [Projectors.of_basis(truncated_svd(stack, rank)) for stack in stacks]
    size, lengths = chunk_size(stacks[0].shape[1:], stacks[0].device), [len(x) for x in stacks]
    alike = len({stack.dtype for stack in stacks}) == 1
    if alike and sum(lengths) <= size:  # a call costs as much as a small matrix
        chunks = [torch.cat(list(stacks))]
    else:
        chunks = [chunk for stack in stacks for chunk in stack.split(size)]
    solve = partial(_solve_chunk, rank=rank, explicit=explicit)
    parts = map_on_threads(solve, chunks)
    if not explicit and len({part.left.row_space is part.right.row_space for part in parts}) > 1:
        return find_projectors(stacks, rank)  # some have no row space that is known well enough
    whole = join_projectors(parts)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [whole.narrow(end - length, length) for end, length in zip(ends, lengths, strict=True)]


def _suits(stack: Tensor, rank: Rank) -> bool:
    """Returns whether the smaller side of the cut is the fast way.

    For few columns of a large weight it is not: a Krylov iteration is faster.
    """
    d = min(stack.shape[1:])
    few = isinstance(rank, int) and krylov.suits_krylov(rank, d)
    return solves_sides(stack) and stack.dtype != torch.float64 and not few


def _solve_chunk(stack: Tensor, rank: Rank, explicit: bool) -> Projectors:
    """Computes the projectors of a chunk [b, m, n]; those not proven by `truncated_svd`."""
    m, n = stack.shape[1:]
    wide = n >= m
    if len(stack) == 1 and isinstance(rank, float):
        single = stack.float() if wide else stack.float().mT
        norm = torch.linalg.vector_norm(single, dim=(1, 2), dtype=torch.float64)
        few = try_solver(partial(energy_triplets, single, norm, rank, TOLERANCE, 0))
        if few is not None:
            return Projectors.of_triplets(few, wide)
    w = stack.double() if wide else stack.double().mT
    side = find_side(w, rank, leading=explicit and m != n)
    bound, space = side.bound, None
    if m != n and not side.leading.all():
        if side.leading.any():
            side = find_side(w, rank, leading=True)
            bound = side.bound
        else:
            factor, failed = torch.linalg.cholesky_ex(side.gram.mT)
            space = RowSpace(w, factor)
            # ‖R̂ − R‖ ≤ ‖Ĝ − G‖ / λ_d, where Ĝ has the rounding of the factorisation.
            off = side.error + 2 * w.shape[1] * EPS * side.energy
            known = (failed.numpy() == 0) & (side.smallest > off)
            bound = np.where(known, bound + off / np.where(known, side.smallest, 1.0), 1.0)
    parts = [_as_projectors(side, bound, wide, space)]
    unproven = np.flatnonzero(~(bound <= TOLERANCE)).tolist()
    if not unproven:
        return parts[0]
    if space is not None:  # refers to every weight of the chunk
        return _solve_chunk(stack, rank, explicit=True)
    proven = [i for i in range(len(stack)) if i not in unproven]
    parts = [parts[0].take(proven)] if proven else []
    parts += [Projectors.of_basis(truncated_svd(stack[i : i + 1], rank)) for i in unproven]
    return join_projectors(parts, proven + unproven)


def _as_projectors(side: CutSide, bound: Any, wide: bool, space: RowSpace | None) -> Projectors:
    """Casts a side of the cut to float32."""
    leading, number, rank = (torch.from_numpy(x) for x in (side.leading, side.number, side.count))
    short = Projector(side.short.float(), leading, number)
    long = Projector(side.long.float(), leading, number, space)
    left, right = (short, long) if wide else (long, short)
    bounds = torch.from_numpy(bound)
    solvers = ("tridiagonal",) * len(bound)
    return Projectors(left, right, rank, bounds, bounds <= TOLERANCE, solvers)


AnyBasis = Basis | Projectors
"""The leading singular subspaces of a weight, as columns or as projectors."""
