"""Singular triplets to float64's bounds from vectors computed in float32.

An eigensolver or a Krylov iteration in float32 leaves an error of about eps32·λ_1/gap in the
leading eigenspace of G = wwᵀ: too much where the spectrum is dense. It is repaired to first order
here, for products with G in float64 of a few vectors, and in float32 of the others:

1. Residuals R = GX − XΘ. In a window around the cut at k, where the gaps are smallest, the products
   are in float64; vectors further from it may err by as much more as their gaps are wider.
2. Rayleigh-Ritz in float64 in the window, where neighbours are too close for a first-order formula.
3. For every other pair of a kept j and a dropped i: x_j += x_i (x_iᵀr_j)/(θ_j − θ_i), which solves
   the invariance equation of the subspace to first order: the error is squared.

Pairs that are both kept are left alone, for they change the vectors but not their span. The bound
rests on the residuals of what is returned, measured in float64 (`measure_residuals`), so a step
that failed is seen, and what float32 lost too.

A stack goes through it as one, by operators that take all of its matrices, and the host decides
nothing: where a matrix cannot be repaired its angle is 1. Vectors are the rows of [b, p, d].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.precise_product import precise_product
from ..precision import EPS
from .bounds import Pairs, Repair, bound_dropped, bound_span_angle, measure_residuals
from .cut import Cut
from .factors import LARGEST_STEP, Known, assemble_factors, sample_residual
from .products import AnyGram
from .solvers import descending_eigh
from .triplets import Triplets

# Kept vectors are turned into each other by so little only: to first order.
SMALL_TURN = 1e-4


@dataclass(frozen=True)
class Ritz:
    """Approximate float32 eigenvectors of wwᵀ [b, d, d], by descending eigenvalue."""

    near: Tensor  # [b, p, d], those to keep and a guard behind them
    far: Tensor  # [b, q, d], further ones
    values: Tensor  # [b, p + q], float64
    # [b], an eigenvalue to assume for what lies in neither; None if together they span all, and
    # `far` too are eigenvectors up to rounding.
    beyond: Tensor | None
    # [b], how far the first eigenvalue outside `near` may exceed values[p], rounding aside.
    error: Tensor
    # [b, q, d], float64, the first of `near` where they are far above all others, and so is
    # rounding along them.
    head: Tensor | None = None


def refine_triplets(
    gram: AnyGram, w: Tensor, norm: Tensor, ritz: Ritz, cut: Cut, solver: str
) -> Triplets:
    """Refines the leading triplets of w; angle 1 if float32 left too little to repair.

    gram: products with wwᵀ; w: [b, d, n], float32, d ≤ n; norm: [b], ‖w‖_F; ritz: with p =
    cut.near; cut: how many vectors to keep; solver: the name of what gave the vectors.
    """
    pairs, repair, angle = refine_span(gram, norm, ritz, cut, sum(w.shape[-2:]))
    theta = torch.where(cut.kept, pairs.theta[:, : cut.most], 0.0)
    known = Known(theta, repair.mixing, repair.residual)
    short, s, long, residual, angle = assemble_factors(w, norm, repair.kept, angle, cut, known)
    if ritz.head is not None:  # whose rounding the right vectors of the others take along
        residual = torch.maximum(residual, sample_residual(w, short, s, long)[0])
    following = cut.at(pairs.theta, 0).clamp_min(0).sqrt()
    solvers = (solver,) * len(w)
    return Triplets(short.mT, long.mT, s, cut.count, following, residual, angle, solvers)


def refine_span(
    gram: AnyGram, norm: Tensor, ritz: Ritz, cut: Cut, sides: int
) -> tuple[Pairs, Repair, Tensor]:
    """Returns pairs around the cut, the vectors kept, and a bound [b] on the sine.

    gram: products with G; norm: [b], the root of its trace; ritz: with p = cut.near; cut: how many
    vectors to keep; sides: d + n of the weight, for the rounding of float64.
    """
    # The Gram matrix and a product with it err by half of this at most, or by what its digits do.
    floor = torch.maximum(3 * sides * EPS * norm.square(), gram.error)
    pairs = _measure_pairs(gram, ritz, cut)
    last, following = cut.at(pairs.theta, -1), cut.at(pairs.theta, 0)
    dropped = bound_dropped(pairs, _bound_outside(pairs, ritz, cut), cut)
    repair = _step_towards_dropped(pairs, ritz, cut)
    largest = torch.linalg.vector_norm(repair.lengths, dim=-1)
    distance = pairs.theta[:, : cut.most] - (dropped + floor)[:, None]
    distance = torch.where(cut.kept, distance, torch.inf)
    missed, feedback = measure_residuals(gram, pairs, repair, distance, cut)
    spread = torch.linalg.vector_norm(1 / distance, dim=-1)
    missed += floor / cut.count.double().sqrt() * spread
    angle = bound_span_angle(missed, feedback, distance)
    sound = (last > following) & (largest <= LARGEST_STEP)
    return pairs, repair, torch.where(sound, angle, torch.nan)


def _measure_pairs(gram: AnyGram, ritz: Ritz, cut: Cut) -> Pairs:
    """Measures Rayleigh quotients and residuals of `ritz.near`, rotated in the window."""
    d, width = ritz.near.shape[-1], 2 * cut.guard
    x = ritz.near.double()
    start = 0
    if ritz.head is not None:
        # The window's last rows come after the kept ones; the head must not reach into them.
        head = ritz.head[:, : cut.near - cut.guard]
        start = head.shape[1]
        x = torch.cat([head, x[:, start:] - (x[:, start:] @ head.mT) @ head], 1)
    # A dense solver keeps many: the gaps next to its window are as small as float32's rounding.
    rough = 0 if ritz.beyond is None else cut.first
    if rough > start:
        middle = gram.multiply_f32(x[:, start:rough].float()).double()
        y = gram(torch.cat([x[:, :start], x[:, rough:]], 1))
        y = torch.cat([y[:, :start], middle, y[:, start:]], 1)
    else:
        y = gram(x)
    theta = torch.linalg.vecdot(x, y, dim=-1)
    r = torch.addcmul(y, x, theta[..., None], value=-1)
    squares = torch.linalg.vecdot(r, r, dim=-1)
    column = torch.arange(cut.near, device=x.device)
    # What rounding did to p of d eigenvectors, extrapolated to all of them and doubled.
    lost = squares if cut.uniform else torch.where(column < cut.end[:, None], squares, 0.0)
    rounding = 2 * (lost[:, start:].sum(-1) * d / (cut.end - start)).sqrt()
    values, *rotated = rayleigh_ritz(cut.window(x, width), cut.window(y, width))
    left = torch.addcmul(rotated[1], rotated[0], values[..., None], value=-1)
    changes = zip((x, theta, r), (rotated[0], values, left), strict=True)
    for whole, rows in (*changes, (squares, torch.linalg.vecdot(left, left, dim=-1))):
        cut.put(whole, rows)
    if not cut.uniform:  # what is near for another matrix of the stack is far for this one
        theta = torch.where(column < cut.end[:, None], theta, ritz.values[:, : cut.near])
    return Pairs(x, theta, r, squares, rounding)


def _bound_outside(pairs: Pairs, ritz: Ritz, cut: Cut) -> Tensor:
    """Bounds the eigenvalues [b] outside the span of the vectors before the window's end."""
    place = cut.end[:, None].clamp_max(ritz.values.shape[1] - 1)
    first = ritz.values.gather(1, place).squeeze(1) + ritz.error + pairs.rounding
    return torch.where(cut.end < ritz.values.shape[1], first, 0.0)


def _step_towards_dropped(pairs: Pairs, ritz: Ritz, cut: Cut) -> Repair:
    """Steps the kept vectors towards the dropped ones, to first order."""
    least, k = cut.least, cut.most
    near, residual = pairs.x.float(), pairs.residual[:, :k].float()
    kept = near[:, :k]
    theta = pairs.theta[:, :k].float()[..., None]
    if not cut.uniform:
        residual = residual * cut.kept[..., None]
        kept = kept * cut.kept[..., None]
        theta = torch.where(cut.kept[..., None], theta, torch.inf)  # no step
    inner = residual @ near.mT  # [b, k, p]
    behind = _mask_window(inner[..., least:] / (theta - pairs.theta[:, None, least:].float()), cut)
    coupling = residual @ ritz.far.mT  # [b, k, q]
    further = ritz.values[:, None, cut.near :].float()
    step = torch.baddbmm(behind @ near[:, least:], coupling / (theta - further), ritz.far)
    if ritz.beyond is not None:
        rest = residual - inner @ near - coupling @ ritz.far
        step += rest / (theta - ritz.beyond.float()[:, None, None])
    mixing = inner[..., :k]
    if cut.uniform:
        step += _turn_window(mixing, theta, cut.first) @ kept
    else:
        mixing = mixing * cut.kept[:, None]
    lengths = torch.linalg.vector_norm(step, dim=-1).double()
    return Repair(kept + step, step, lengths, residual, mixing)


def _turn_window(mixing: Tensor, theta: Tensor, first: int) -> Tensor:
    """Rotates the kept vectors before the window with those inside: [b, k, k].

    It takes this mixing out. Next to the cut even a small mixing is large over the gap. What is not
    small is between neighbours, and both are as far from the cut.

    mixing: [b, k, k], overwritten with what is left; theta: [b, k, 1]; first: the start of the
    window.
    """
    turn = torch.zeros_like(mixing)
    for rows, columns in ((slice(first), slice(first, None)), (slice(first, None), slice(first))):
        wanted = mixing[:, rows, columns] / (theta[:, rows] - theta[:, columns].mT)
        turn[:, rows, columns] = torch.where(wanted.abs() < SMALL_TURN, wanted, 0.0)
        mixing[:, rows, columns].masked_fill_(wanted.abs() < SMALL_TURN, 0.0)
    return turn


def _mask_window(behind: Tensor, cut: Cut) -> Tensor:
    """Zeroes coefficients [b, k, p − least] of kept vectors and within the window."""
    if cut.uniform:
        behind[:, cut.first :] = 0
        return behind
    column = torch.arange(cut.least, cut.near, device=behind.device)
    row = torch.arange(cut.most, device=behind.device)[:, None]
    start, end, count = (x[:, None, None] for x in (cut.start, cut.end, cut.count))
    wanted = (column >= count) & ((row < start) | (column >= end))
    return torch.where(wanted, behind, 0.0)


def rayleigh_ritz(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors of G within the span of the rows of x; float64, NaN where they have no basis.

    x: [b, q, d], any basis, nearly orthonormal; y: xG [b, q, d]. Returns the eigenvalues [b, q],
    descending, the eigenvectors and their products with G.
    """
    factor, failed = torch.linalg.cholesky_ex(precise_product(x, x))
    half = torch.linalg.solve_triangular(factor, precise_product(x, y), upper=False)
    within = torch.linalg.solve_triangular(factor, half.mT.contiguous(), upper=False)
    values, vectors = descending_eigh(torch.where(failed[:, None, None] == 0, within, 0.0))
    rotation = torch.linalg.solve_triangular(factor.mT, vectors, upper=True).mT
    values = torch.where(failed[:, None] == 0, values, torch.nan)
    return values, precise_product(rotation, x.mT), precise_product(rotation, y.mT)
