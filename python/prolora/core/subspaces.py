"""Comparison of subspaces: their overlap, its chance level, and principal angles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from .angles import column_angles, orthonormal_angles, stacked_angles
from .arrays import Array, MatrixLike, to_kind_of, to_tensor
from .basis import Basis, read_weight, truncated_svd
from .exceptions import NonFiniteWeights, ShapeMismatch, SolverFailure
from .ops.operands import flatten_stack
from .ops.subspace_overlap import subspace_overlap
from .parallel import map_on_threads
from .precision import in_full_precision, is_finite, working_dtype
from .projectors import AnyBasis, Projector, Projectors, find_projectors
from .rank_rule import Rank, read_rank
from .short_text import format_range
from .svd.solvers import try_solver
from .svd.stacks import is_on_host
from .validation import check_operand, refuse_vmap

ANGLE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Quantiles of the principal angles that reports contain: 0 is the smallest angle."""


@dataclass(frozen=True, repr=False)
class Similarity:
    """Overlap Φ, 0 … 1, of the leading subspaces of two weights.

    For one pair or a stack of pairs. Φ = ‖U_sᵀU_t‖_F² / min(k_s, k_t) is 1 if one subspace contains
    the other. Two unrelated bases have on average max(k_s, k_t) / dimension, the chance level: for
    example 0.25 for 80 columns of 320, and 1 for bases of the whole space.

    Attributes:
        left: [...], Φ of the left subspaces (the output of the module).
        right: [...], Φ of the right subspaces (the input of the module).
        chance_left: [...], the chance level of `left`.
        chance_right: [...], the chance level of `right`.
    """

    left: Tensor
    right: Tensor
    chance_left: Tensor
    chance_right: Tensor

    def __repr__(self) -> str:
        """Returns, for example, Similarity(left 0.93, right 0.91, by chance 0.17 and 0.12)."""
        left, right, chance_left, chance_right = (
            format_range(x, ".2f")
            for x in (self.left, self.right, self.chance_left, self.chance_right)
        )
        return f"Similarity(left {left}, right {right}, by chance {chance_left} and {chance_right})"

    @property
    def above_left(self) -> Tensor:
        """(Φ − chance)/(1 − chance) on the left: 0 unrelated, 1 equal, NaN if chance is 1."""
        return _above_chance(self.left, self.chance_left)

    @property
    def above_right(self) -> Tensor:
        """(Φ − chance)/(1 − chance) on the right."""
        return _above_chance(self.right, self.chance_right)


def _above_chance(phi: Tensor, chance: Tensor) -> Tensor:
    undefined = chance >= 1
    share = (phi - chance) / torch.where(undefined, 1.0, 1 - chance)
    return torch.where(undefined, torch.full_like(share, torch.nan), share)


@in_full_precision
def basis_similarity(source: AnyBasis, target: AnyBasis) -> Similarity:
    """Computes `similarity` of two existing bases, or of two stacks of projectors."""
    if source.shape != target.shape:
        raise ShapeMismatch(
            f"source {list(source.shape)} and target {list(target.shape)} differ: subspaces of "
            "different spaces cannot be compared"
        )
    m, n = source.shape[-2:]
    fewest = torch.minimum(source.rank, target.rank).clamp_min(1).double()
    most = torch.maximum(source.rank, target.rank).double()
    if isinstance(source, Basis) and isinstance(target, Basis):
        work = working_dtype(source.U.dtype, target.U.dtype)
        sides = [[basis.U.to(work), basis.V.to(work)] for basis in (source, target)]
        left, right = subspace_overlap(*sides)
    else:
        assert isinstance(source, Projectors) and isinstance(target, Projectors)
        left, right = source.left.overlap(target.left), source.right.overlap(target.right)
    return Similarity(
        left=left / fewest,
        right=right / fewest,
        chance_left=most / m,
        chance_right=most / n,
    )


@refuse_vmap("similarity")
@in_full_precision
def similarity(W_src: MatrixLike | Basis, W_tgt: MatrixLike | Basis, *, rank: Rank) -> Similarity:
    """Computes the overlap Φ of the leading subspaces of two weights or stacks.

    Args:
        W_src: [..., m, n] weight, or its Basis.
        W_tgt: [..., m, n] weight of the same shape, or its Basis.
        rank: number of columns, or share of the energy, as in `truncated_svd`. Ignored for a
            Basis.

    Returns:
        A `Similarity` of torch tensors, also for arrays of other libraries.

    Raises:
        ShapeMismatch: the shapes differ.
        UnsupportedTensor, UnsupportedDevice, NonFiniteWeights, SolverFailure: as `truncated_svd`.
    """
    rank = read_rank(rank)
    weights = [
        w if isinstance(w, Basis) else read_weight(w, name)
        for name, w in (("W_src", W_src), ("W_tgt", W_tgt))
    ]
    tensors = [w for w in weights if isinstance(w, Tensor)]
    shapes = {w.shape for w in tensors}
    if len(tensors) < 2 or len(shapes) > 1 or any(not is_on_host(w) for w in tensors):
        pair = [w if isinstance(w, Basis) else truncated_svd(w, rank) for w in weights]
        return basis_similarity(*pair)
    (shape,) = shapes
    stacks = [w.reshape(-1, *shape[-2:]) for w in tensors]
    result = basis_similarity(*find_projectors(stacks, rank))
    fields = {name: value.reshape(shape[:-2]) for name, value in result.__dict__.items()}
    return Similarity(**fields)


@overload
def principal_angles(X: Tensor, Y: MatrixLike) -> Tensor: ...


@overload
def principal_angles(X: Array, Y: MatrixLike) -> Array: ...


@refuse_vmap("principal_angles")
@in_full_precision
def principal_angles(X: Any, Y: Any) -> Any:
    """Computes the principal angles between two column spaces, ascending, in radians.

    The cosine of an angle below √eps rounds to 1. Angles below 45° are therefore computed from
    their sines, the singular values of Y − X(XᵀY) (Björck & Golub 1973), in float64.

    Args:
        X: [..., m, p] of full column rank; it need not be orthonormal.
        Y: [..., m, q], likewise.

    Returns:
        [..., min(p, q)] in float64, an array of the same library as X.

    Raises:
        ShapeMismatch: X and Y have a different number of rows.
        NonFiniteWeights: X or Y contains NaN or Inf.
        SolverFailure: the SVD did not converge, or its input overflowed.
        UnsupportedTensor, UnsupportedDevice: as `truncated_svd`.
    """
    x, y = to_tensor(X, "X"), to_tensor(Y, "Y")
    for name, side in (("X", x), ("Y", y)):
        check_operand(name, side)
        if not is_finite(side):
            raise NonFiniteWeights(f"NaN or Inf in {name}")
    x, y = x.double(), y.double()
    if x.ndim < 2 or y.ndim < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ShapeMismatch(
            f"X {list(x.shape)} and Y {list(y.shape)} must be [..., m, p] and [..., m, q]"
        )
    if x.shape[-1] < y.shape[-1]:
        x, y = y, x
    flat = [flatten_stack(side) for side in (x, y)]
    angles = try_solver(lambda: column_angles(*flat))
    if angles is None:
        raise SolverFailure(
            "the SVD behind the principal angles of X and Y did not converge: are their entries "
            "too large or too small for float64?"
        )
    return to_kind_of(angles.reshape(*x.shape[:-2], angles.shape[-1]), X)


@in_full_precision
def angle_quantiles(
    source: AnyBasis, target: AnyBasis, shares: Sequence[float] = ANGLE_SHARES
) -> tuple[Tensor, Tensor]:
    """Returns quantiles of the principal angles between two stacks of bases.

    The bases are orthonormal, so this takes an eighth to a half of the time of `principal_angles`
    (`orthonormal_angles`). The error for bases in float32 is about 1e-7, and 1e-4 near 90°.

    Args:
        source: bases or projectors of a stack of matrices [b, m, n].
        target: those of a stack of the same shape.
        shares: between 0 (the smallest angle) and 1 (the largest).

    Returns:
        Radians on the left and on the right, float64, [b, len(shares)] each; NaN if a basis has no
        column.
    """
    if isinstance(source, Projectors) and isinstance(target, Projectors):
        return _projector_quantiles(source, target, torch.tensor(shares, dtype=torch.float64))
    assert isinstance(source, Basis) and isinstance(target, Basis)
    work = working_dtype(source.U.dtype, target.U.dtype)
    quantiles = torch.tensor(shares, dtype=torch.float64, device=source.U.device)
    count = torch.minimum(source.rank, target.rank)
    if is_on_host(source.U):
        return _quantiles_in_turn(source, target, list(range(len(count))), quantiles)
    both = []
    for s, t in ((source.U, target.U), (source.V, target.V)):
        angles = stacked_angles(s.to(work), t.to(work), source.rank, target.rank)
        beyond = torch.arange(angles.shape[1], device=angles.device) >= count[:, None]
        both.append(angles.masked_fill(beyond, torch.nan).nanquantile(quantiles, 1).mT)
    left, right = both
    unknown = (left.isnan() | right.isnan()).any(1) & (count > 0)
    rest = unknown.nonzero().flatten().tolist()  # the only synchronisation with the device
    if rest:
        left[rest], right[rest] = _quantiles_in_turn(source, target, rest, quantiles)
    return left, right


def _quantiles_in_turn(
    source: Basis, target: Basis, places: list[int], shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes `angle_quantiles` of some matrices, one by one."""
    work = working_dtype(source.U.dtype, target.U.dtype)
    pairs = [(source[i], target[i]) for i in places]
    sides = [(s.U, t.U) for s, t in pairs] + [(s.V, t.V) for s, t in pairs]
    quantiles = map_on_threads(
        lambda side: orthonormal_angles(*(x.to(work) for x in side)).quantile(shares), sides
    )
    left, right = torch.stack(quantiles).chunk(2)
    empty = (torch.minimum(source.rank, target.rank)[places] < 1)[:, None]
    return left.masked_fill(empty, torch.nan), right.masked_fill(empty, torch.nan)


def _projector_quantiles(
    source: Projectors, target: Projectors, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes `angle_quantiles` of projectors, one pair after the other."""
    pairs = [
        (getattr(source, side)[i : i + 1], getattr(target, side)[i : i + 1])
        for side in ("left", "right")
        for i in range(len(source.rank))
    ]

    def quantiles(pair: tuple[Projector, Projector]) -> Tensor:
        angles = projector_angles(pair[0], pair[1])
        return angles.quantile(shares) if len(angles) else torch.full_like(shares, torch.nan)

    left, right = torch.stack(map_on_threads(quantiles, pairs)).chunk(2)
    return left, right


def projector_angles(source: Projector, target: Projector) -> Tensor:
    """Returns the principal angles between the ranges of two stacks of one, ascending.

    Two complements have the same angles as their subspaces, except for zeros (Knyazev & Argentati
    2006, theorem 2.7). Between a subspace and the complement of another one the sines come from
    the products of their rows.
    """
    if bool(target.leading) and not bool(source.leading):
        source, target = target, source
    m = source.rows.shape[-1]
    rows = [x.rows[0, : int(x.number)] for x in (source, target)]
    ranks = [
        len(x) if bool(y.leading) else m - len(x)
        for x, y in zip(rows, (source, target), strict=True)
    ]
    q = min(ranks)
    if not q:
        return torch.zeros(0, dtype=torch.float64)
    if bool(source.leading) and not bool(target.leading):
        sines = torch.linalg.svdvals((rows[1] @ rows[0].mT).double()).flip(0).clamp(0, 1)
        angles = sines.asin()  # of the source's ranks[0] directions, without zeros
        angles = torch.nn.functional.pad(angles, (max(0, ranks[0] - len(angles)), 0))
        return angles[:q]  # a larger source has directions at right angles to all of the target
    if min(len(x) for x in rows) == 0:
        return torch.zeros(q, dtype=torch.float64)
    angles = orthonormal_angles(rows[0].mT, rows[1].mT)
    if len(angles) >= q:
        return angles[len(angles) - q :]
    return torch.nn.functional.pad(angles, (q - len(angles), 0))
