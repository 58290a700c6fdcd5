"""Singular vectors on one side of a cut, from one reduction of the Gram matrix, with a bound.

A projector needs only the smaller side of the cut: P = UUᵀ = I − CCᵀ, where U are the k columns
that are kept and C the d − k that are left out. At an energy of 0.99 most weights keep two thirds
of their columns or more, so C is small.

One reduction wwᵀ = QTQᵀ in float64, the eigenvalues of one end by Sturm counts, the vectors of the
smaller side by twisted factorisations, and their images wᵀc/σ on the long side. There is no divide
and conquer, and no vector of the larger side is computed.

The bound on the sine of the largest principal angle rests on measurements with random vectors:

- E = wwᵀ − QTQᵀ. T has every eigenvalue of wwᵀ to ‖E‖ (Weyl).
- R = wwᵀC − CΛ. A vector c_i is off the true subspace by at most ‖R‖ / |λ_i − λ|, where λ is the
  first eigenvalue beyond the cut (Davis & Kahan); all of them by at most the root of the sum of
  squares. One bound for the whole block (the smallest gap for all) would be up to 1000 times as
  large.
- In the image wᵀc_i/σ_i of a vector that is left out, an error along a kept vector u_k grows by
  σ_k/σ_i; in that of a kept vector it shrinks.
- The deviation of both sets of vectors from orthonormal.

A cut within ‖E‖ of a tie in the energy is not proven: the number of columns is not certain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..ops import native
from ..ops.cut_side import FACTS, cut_side
from ..ops.tridiagonal import (
    MAX_COLUMNS,
    multiply_reduced,
    tridiagonal_values,
    tridiagonal_vectors,
    tridiagonalise,
)
from ..precision import EPS, EPS32
from ..rank_rule import Rank
from ..symmetric import upper_gram
from .solvers import random_probes
from .stacks import is_on_host
from .triplets import Triplets

# Random vectors for a measurement: one group of lanes of the op. Three times the root mean square
# of what they see is below the Frobenius norm with a chance of 5e-6, if one vector alone is wrong.
PROBES = 16
CAUTION = 3 / math.sqrt(PROBES)
# Up to so many rows the op multiplies by Q itself; LAPACK's blocked ormqr is faster beyond.
OWN_PRODUCT_ROWS = 256
# Up to so many rows a native op does everything: the time of small operations counts there.
ONE_CALL_ROWS = 160
# The eigenvalues of T are exact to this share of the sum of all of them.
BISECTION = 2.0**-45

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Reduction:
    """wwᵀ = Q T Qᵀ of a stack w [b, d, n], d ≤ n, in float64."""

    reflections: Tensor  # [b, d, d]
    scales: Tensor  # [b, d]
    diagonal: Tensor  # [b, d]
    beside: Tensor  # [b, d]
    energy: Numbers  # [b], ‖w‖_F²
    error: Numbers  # [b], upper estimate of ‖wwᵀ − QTQᵀ‖_F and of the error of an eigenvalue

    @classmethod
    def of(cls, w: Tensor, gram: Tensor) -> Reduction:
        """Reduces gram = wwᵀ [b, d, d], of which the upper triangle is read."""
        energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1).numpy()
        reflections, scales, diagonal, beside = tridiagonalise(gram)
        probes = random_probes(w.shape[1], PROBES, torch.float64, w.device).mT.contiguous()
        implied = multiply_reduced(reflections, scales, diagonal, beside, probes)
        missed = torch.baddbmm(implied, probes @ w, w.mT, beta=-1)
        error = _estimate_norm(missed) + BISECTION * energy
        return cls(reflections, scales, diagonal, beside, energy, error)

    def largest(self, count: int) -> Numbers:
        """Returns the largest eigenvalues [b, count], descending."""
        return tridiagonal_values(self.diagonal, self.beside, count).numpy()

    def smallest(self, count: int) -> Numbers:
        """Returns the smallest eigenvalues [b, count], ascending."""
        return -tridiagonal_values(-self.diagonal, -self.beside, count).numpy()

    def vectors(self, values: Numbers) -> Tensor:
        """Returns unit eigenvectors of wwᵀ for eigenvalues [b, c]: rows [b, c, d]."""
        wanted = torch.from_numpy(values)
        if self.diagonal.shape[1] <= OWN_PRODUCT_ROWS:
            ends = self.diagonal, self.beside
            return tridiagonal_vectors(*ends, wanted, self.reflections, self.scales)
        rows = tridiagonal_vectors(self.diagonal, self.beside, wanted)
        for one, reflections, scales in zip(rows, self.reflections, self.scales, strict=True):
            one[:, 1:] = torch.ormqr(reflections[:-1, 1:].mT, scales[:-1], one[:, 1:].mT).mT
        return rows


@dataclass(frozen=True)
class CutSide:
    """Singular vectors of w [b, d, n], d ≤ n, on one side of the cut, as rows in float64.

    Attributes:
        short: [b, c, d], of the short side; zero rows beyond the number of each matrix.
        long: [b, c, n], of the long side, likewise.
        gram: wwᵀ [b, d, d]; the lower triangle may be empty.
        leading: bool [b], whether the rows are the leading ones (kept), or those left out.
        number: [b], rows in use.
        count: [b], columns that are kept.
        following: [b], the first eigenvalue beyond: σ_{k+1}² of leading rows, σ_k² of others.
        bound: [b], on the sine of the largest principal angle, short and long; 1 if not proven.
        smallest: [b], the smallest eigenvalue of wwᵀ.
        energy: [b], ‖w‖_F².
        error: [b], as of `Reduction`.
        s: [b, c], the singular values of the rows, from the outer end towards the cut.
    """

    short: Tensor
    long: Tensor
    gram: Tensor
    leading: Numbers
    number: Numbers
    count: Numbers
    following: Numbers
    bound: Numbers
    smallest: Numbers
    energy: Numbers
    error: Numbers
    s: Numbers


def solves_sides(w: Tensor) -> bool:
    """Returns whether the extension can reduce the Gram matrices of w [b, d, n], d ≤ n."""
    fits = is_on_host(w) and len(w) > 0 and min(w.shape[1:]) <= MAX_COLUMNS
    return fits and native.EXTENSION.kernels is not None


def find_side(w: Tensor, rank: Rank, *, leading: bool = False) -> CutSide:
    """Computes the singular vectors on the smaller side of the cut, or always the leading ones.

    Numbers for each matrix are numpy arrays: an operation on a few of them takes a third of the
    time that it takes in torch, and a small stack needs some forty.

    Args:
        w: [b, d, n], d ≤ n, float64, finite.
        rank: columns to keep, or the share of Σσ² that they hold.
        leading: always the columns that are kept.
    """
    d = w.shape[1]
    if d <= ONE_CALL_ROWS and w.shape[2] <= 4 * ONE_CALL_ROWS:
        return _find_small_side(w, rank, leading)
    gram = upper_gram(w)
    reduction = Reduction.of(w, gram)
    count, small, certain = _count_kept(reduction, rank)
    kept = np.full(len(count), True) if leading else 2 * count <= d
    number = np.where(kept, count, d - count)
    values, following = _read_values(reduction, small, kept, number)
    rows = reduction.vectors(values)
    long = rows @ w
    lengths = torch.linalg.vector_norm(long, dim=-1).clamp_min_(1e-300)
    long /= lengths[..., None]

    unused, c = None, values.shape[1]
    if number.min() < c:
        unused = torch.from_numpy(np.arange(c) >= number[:, None])
        rows.masked_fill_(unused[..., None], 0)
        long.masked_fill_(unused[..., None], 0)
    s = lengths.numpy()
    off = _measure_residual(w, rows, values) + reduction.error
    energy, error = reduction.energy, reduction.error
    apart = np.abs(values - following[:, None]) - error[:, None]
    growth = np.maximum(np.sqrt(np.maximum(following, 0))[:, None] / s, 1)
    rounding = 2 * d * EPS * np.sqrt(energy)[:, None] / s  # of wᵀc
    with np.errstate(divide="ignore", invalid="ignore"):
        angle = np.where(apart > 0, off[:, None] * growth / apart, 1.0) + rounding
    if unused is not None:
        angle = np.where(unused, 0.0, angle)
        s = np.where(unused, 0.0, s)
    bound = np.sqrt((angle * angle).sum(1)) + EPS32 * math.sqrt(c)
    skew = measure_skew(rows, unused) + measure_skew(long, unused)
    bound += np.where(skew <= w.shape[2] * EPS32, skew, 1.0)  # as of LAPACK in float32
    bound = np.where(certain & np.isfinite(bound), np.minimum(bound, 1.0), 1.0)
    return CutSide(
        short=rows,
        long=long,
        gram=gram,
        leading=kept,
        number=number,
        count=count,
        following=following,
        bound=bound,
        smallest=small[:, 0],
        energy=energy,
        error=error,
        s=s,
    )


def _find_small_side(w: Tensor, rank: Rank, leading: bool) -> CutSide:
    """Computes the smaller side of small weights by the op, one core a matrix."""
    gram = w @ w.mT
    shorts, longs, values, facts = cut_side(w, gram, rank, leading)
    named = dict(zip(FACTS, facts.numpy().T, strict=True))
    number, count = (named.pop(x).astype(np.int64) for x in ("number", "count"))
    kept = named.pop("leading") > 0
    c = int(number.max())
    short, long, s = shorts[:, :c], longs[:, :c], values[:, :c].numpy()
    if number.min() < c:
        unused = torch.from_numpy(np.arange(c) >= number[:, None])[..., None]
        short, long = short.masked_fill(unused, 0), long.masked_fill(unused, 0)
        s = np.where(unused[..., 0].numpy(), 0.0, s)
    return CutSide(short, long, gram, kept, number, count, **named, s=s)


def leading_triplets(w: Tensor, rank: Rank) -> Triplets:
    """Computes leading triplets of w [b, d, n], float32, d ≤ n; angle 1 if not proven."""
    precise = w.double()
    side = find_side(precise, rank, leading=True)
    # Values that are equal up to rounding may be in the other order.
    s = torch.from_numpy(np.minimum.accumulate(side.s, 1))
    short, long = side.short.float(), side.long.float()
    following = torch.from_numpy(np.sqrt(np.maximum(side.following, 0)))
    return Triplets(
        short=short.mT,
        long=long.mT,
        s=s,
        count=torch.from_numpy(side.count),
        following=following,
        residual=torch.from_numpy(_measure_factors(precise, short, s, long)),
        angle=torch.from_numpy(side.bound),
        solvers=("tridiagonal",) * len(w),
    )


def _measure_factors(w: Tensor, short: Tensor, s: Tensor, long: Tensor) -> Numbers:
    """Estimates the larger of ‖wV − UΣ‖_F and ‖wᵀU − VΣ‖_F [b] from above, as they are stored."""
    probes = random_probes(s.shape[1], PROBES, torch.float64, w.device).mT
    scaled = probes * s[:, None]
    u, v = short.double(), long.double()
    left = torch.baddbmm(scaled @ u, probes @ v, w.mT, beta=-1)
    right = torch.baddbmm(scaled @ v, probes @ u, w, beta=-1)
    larger: Numbers = np.maximum(_estimate_norm(left), _estimate_norm(right))
    return larger


def _count_kept(reduction: Reduction, rank: Rank) -> tuple[Numbers, Numbers, Numbers]:
    """Counts the columns to keep.

    Returns the counts [b], the smallest eigenvalues, ascending: one more than are left out if these
    are the smaller side, and whether each count is certain: bool [b].
    """
    d = reduction.diagonal.shape[1]
    energy, error = reduction.energy, reduction.error
    positive: Numbers = energy > 0
    if not isinstance(rank, float):
        small = reduction.smallest(d - rank + 1 if rank < d < 2 * rank else 1)
        # A weight without full rank has fewer columns than asked for: another solver counts them.
        certain = small[:, 0] > error if rank >= d else positive
        return np.full(len(small), min(rank, d)), small, certain
    half = min(d, d // 2 + 1)
    margin = (half * error)[:, None]  # of a sum
    wanted = ((1 - rank) * energy)[:, None]
    for size in (min(half, d // 8 + 1), half):  # often few are left out
        small = reduction.smallest(size)
        sums = np.cumsum(np.maximum(small, 0), 1)
        left_out = (sums <= wanted).sum(1)
        certain = np.all(np.abs(sums - wanted) > margin, 1)
        larger = left_out == size  # the cut is further on
        if not larger.any():
            return d - left_out, small, certain & positive
    wanted = (rank * energy)[:, None]
    sums = np.cumsum(np.maximum(reduction.largest(half), 0), 1)
    number = np.minimum((sums < wanted).sum(1) + 1, d)
    sure = np.all(np.abs(sums - wanted) > margin, 1)
    count = np.where(larger, number, d - left_out)
    return count, small, np.where(larger, sure, certain) & positive


def _read_values(
    reduction: Reduction, small: Numbers, kept: Numbers, number: Numbers
) -> tuple[Numbers, Numbers]:
    """Returns the eigenvalues of each side [b, c], and the first one beyond the cut [b].

    They begin at the outer end: the largest, or the smallest. Nothing lies beyond all of them: the
    value is then infinitely far.
    """
    c, d = int(number.max()), reduction.diagonal.shape[1]
    sides = []
    for ends, nothing in (
        (reduction.largest(min(d, c + 1)) if kept.any() else small, -np.inf),
        (small, np.inf),
    ):
        if ends.shape[1] <= c:
            ends = np.pad(ends, ((0, 0), (0, 1)), constant_values=nothing)
        place = np.minimum(number, ends.shape[1] - 1)
        sides.append((ends[:, :c], np.take_along_axis(ends, place[:, None], 1)[:, 0]))
    if kept.all() or not kept.any():
        values, following = sides[0 if kept[0] else 1]
        return np.ascontiguousarray(values), following
    (large, after), (tail, before) = sides
    return np.where(kept[:, None], large, tail), np.where(kept, after, before)


def _estimate_norm(products: Tensor) -> Numbers:
    """Estimates ‖A‖_F [b] from above, from products of A with random vectors [b, PROBES, m]."""
    norm: Numbers = torch.linalg.vector_norm(products, dim=(1, 2)).numpy()
    return CAUTION * norm


def _measure_residual(w: Tensor, rows: Tensor, values: Numbers) -> Numbers:
    """Estimates ‖Cwwᵀ − ΛC‖_F [b] of rows C [b, c, d] from above."""
    probes = random_probes(rows.shape[1], PROBES, torch.float64, w.device).mT
    scaled = torch.from_numpy(values)[:, None] * probes
    missed = torch.baddbmm(scaled @ rows, probes @ rows @ w, w.mT, beta=-1)
    return _estimate_norm(missed)


def measure_skew(rows: Tensor, unused: Tensor | None = None) -> Numbers:
    """Measures ‖CCᵀ − I‖_F [b] of rows C [b, c, m] in float64; from above for many rows."""
    if rows.shape[1] <= 4 * PROBES:
        excess = rows @ rows.mT
        excess.diagonal(dim1=1, dim2=2).sub_(1 if unused is None else (~unused).double())
        exact: Numbers = torch.linalg.vector_norm(excess, dim=(1, 2)).numpy()
        return exact
    probes = random_probes(rows.shape[1], PROBES, torch.float64, rows.device).mT
    if unused is not None:
        probes = probes * ~unused[:, None]
    return _estimate_norm(probes @ rows @ rows.mT - probes)
