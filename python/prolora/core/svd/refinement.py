"""Singular triplets good to float64's bounds from vectors that only float32 was spent on.

An eigensolver or a Krylov iteration in float32 leaves an error of about eps32·λ_1/gap in the
leading eigenspace of G = wwᵀ: too much where the spectrum is dense. It is repaired to first order
here, for one product with G in float64 and a few in float32:

1. Residuals R = GX − XΘ in float64. They are as small as float32's rounding, so float32 then holds
   them to seven digits, and everything derived from them may run in float32.
2. Rayleigh-Ritz in float64 in a window around the cut at k, where neighbours are too close for a
   first-order formula.
3. For every other pair of a kept j and a dropped i: x_j += x_i (x_iᵀr_j)/(θ_j − θ_i), which solves
   the invariance equation of the subspace to first order: the error is squared.

Pairs that are both kept are left alone, for they change the vectors but not their span. The bound
rests on the residuals of what is returned (`bound_span_angle`), so a step that failed is seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import EPS, EPS32
from .products import FormedGram, ImpliedGram, multiply_narrow
from .solvers import estimate_skew
from .triplets import Triplets

# Times √length·eps: the rounding of float32 products that are not measured.
SAFETY = 4
# A first-order step, or a deviation of VᵀV from I, beyond this is not small.
LARGEST_STEP = 0.1
# Rows that the rounding of a product is measured on.
SAMPLE = 48
# Columns this close to orthonormal (Frobenius, doubled) are as good as LAPACK's in float32.
SKEW = 1e-4


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenvectors of G = wwᵀ [d, d] in float32, by descending eigenvalue.

    Attributes:
        near: [d, p], the k to keep and a guard behind them.
        far: [d, q], further ones.
        values: [p + q], float64.
        beyond: an eigenvalue to assume for what lies in neither; None if together they span all.
        error: how far the first eigenvalue outside `near` may exceed values[p], rounding aside.
        converged: whether `far` too are eigenvectors up to rounding.
    """

    near: Tensor
    far: Tensor
    values: Tensor
    beyond: float | None
    error: float
    converged: bool


@dataclass(frozen=True)
class Refined:
    """Leading triplets of one matrix w [d, n].

    Attributes:
        short, long: [d, k] and [n, k], float32.
        s: [k], float64.
        following: the estimate of σ_{k+1}.
        residual: upper bound on ‖w·long − short·s‖_F and ‖wᵀ·short − long·s‖_F.
        angle: upper bound on the sine of the largest angle to the true subspaces, left and right;
            1 where nothing is known.
    """

    short: Tensor
    long: Tensor
    s: Tensor
    following: float
    residual: float
    angle: float

    def triplets(self, rung: str) -> Triplets:
        """The triplets as a stack of one matrix."""
        facts = self.s.new_tensor([self.following, self.residual, self.angle])
        return Triplets(
            short=self.short[None],
            long=self.long[None],
            s=self.s[None],
            count=torch.tensor([len(self.s)], device=self.s.device),
            following=facts[:1],
            residual=facts[1:2],
            angle=facts[2:],
            rungs=(rung,),
        )


@dataclass(frozen=True)
class Pairs:
    """The Ritz pairs of `Ritz.near` in float64, and how far they are from eigenpairs of G.

    Attributes:
        x: [d, p].
        image: Gx [d, p].
        theta: [p].
        residual: Gx − xθ [d, p].
        rounding: ‖Gx − xθ‖_F over all d eigenvectors, as estimated.
        start: the columns from here on have been rotated to eigenvectors within their span.
    """

    x: Tensor
    image: Tensor
    theta: Tensor
    residual: Tensor
    rounding: float
    start: int


@dataclass(frozen=True)
class Repair:
    """The kept vectors after a first-order step, in float32.

    Attributes:
        kept: [d, k].
        step: [d, k], by which they were moved.
        lengths: [k], float64, of the columns of `step`.
        residual: [d, k], Gx − xθ before the step.
        inner: [p, k], the share of that in the span of `Ritz.near`.
        theta: [≥ k], float64.
    """

    kept: Tensor
    step: Tensor
    lengths: Tensor
    residual: Tensor
    inner: Tensor
    theta: Tensor


def refine_triplets(
    gram: FormedGram | ImpliedGram, w: Tensor, norm: float, ritz: Ritz, k: int
) -> Refined | None:
    """The k leading triplets of w [d, n], d ≤ n, or None where float32 left too little to repair.

    Args:
        gram: products with wwᵀ.
        w: float32.
        norm: ‖w‖_F.
        ritz: with k < p.
        k: columns to return.
    """
    d, n = w.shape
    floor = 10 * (d + n) * EPS * norm**2
    pairs = _measure_pairs(gram, ritz, k)
    if not pairs.theta[k - 1] > pairs.theta[k] > 0:
        return None
    largest_dropped = _bound_dropped(pairs, ritz, k)
    if largest_dropped is None:
        return None
    repair = _step_towards_dropped(pairs, ritz, k)
    largest = float(torch.linalg.vector_norm(repair.lengths))
    if not largest <= LARGEST_STEP:
        return None
    rho = _bound_residuals(gram, pairs, repair, norm, n, ritz.converged)
    angle = bound_span_angle(
        rho + floor / math.sqrt(k),
        repair.inner[:k].double() * (1 + largest) ** 2,
        pairs.theta[:k] - (largest_dropped + floor),
    )
    return assemble_factors(w, norm, repair, angle)


def _measure_pairs(gram: FormedGram | ImpliedGram, ritz: Ritz, k: int) -> Pairs:
    """Rayleigh quotients and residuals of `ritz.near`, the columns around k rotated."""
    d, p = ritz.near.shape
    start = max(0, 2 * k - p)  # the window [start, p) has the cut in its middle
    x = ritz.near.double()
    y = gram(x)
    theta = torch.linalg.vecdot(x, y, dim=0)
    r = torch.addcmul(y, x, theta, value=-1)
    # What rounding did to p of d eigenvectors, extrapolated to all of them and doubled.
    rounding = 2 * math.sqrt(d / p) * float(torch.linalg.vector_norm(r))
    theta[start:] = rayleigh_ritz(x[:, start:], y[:, start:])
    r[:, start:] = torch.addcmul(y[:, start:], x[:, start:], theta[start:], value=-1)
    return Pairs(x, y, theta, r, rounding, start)


def _bound_dropped(pairs: Pairs, ritz: Ritz, k: int) -> float | None:
    """Upper bound on the eigenvalues behind the cut at k, rounding aside; None where there is none.

    By Courant & Fischer none outside `near` exceeds the first one there.
    """
    theta, p = pairs.theta, len(pairs.theta)
    some_left = p < len(ritz.values)
    outside = float(ritz.values[p]) + ritz.error + pairs.rounding if some_left else 0.0
    behind = float(theta[k]) - outside
    if behind <= 0:
        return None
    return float(theta[k]) + float(pairs.residual[:, k:].square().sum()) / behind


def _step_towards_dropped(pairs: Pairs, ritz: Ritz, k: int) -> Repair:
    """The first-order step of the kept vectors towards the dropped ones."""
    near, residual = pairs.x.float(), pairs.residual[:, :k].float()
    inner = near.mT @ residual  # [p, k]
    theta, dropped = pairs.theta[:k].float(), pairs.theta[k:].float()
    behind = inner[k:] / (theta - dropped[:, None])
    behind[:, pairs.start :] = 0  # Rayleigh-Ritz has seen to these
    coupling = ritz.far.mT @ residual  # [q, k]
    step = near[:, k:] @ behind
    further = ritz.values[len(pairs.theta) :].float()
    step = torch.addmm(step, ritz.far, coupling / (theta - further[:, None]))
    if ritz.beyond is not None:
        rest = residual - near @ inner - ritz.far @ coupling
        step += rest / (theta - ritz.beyond)
    lengths = torch.linalg.vector_norm(step, dim=0).double()
    return Repair(near[:, :k] + step, step, lengths, residual, inner, pairs.theta)


def _bound_residuals(
    gram: FormedGram | ImpliedGram,
    pairs: Pairs,
    repair: Repair,
    norm: float,
    n: int,
    converged: bool,
) -> Tensor:
    """[k], bounds on the residuals of the repaired vectors outside of their span."""
    k, d = repair.step.shape[1], len(repair.step)
    start, step, theta = pairs.start, repair.step, pairs.theta
    inside = slice(0, start)
    # The columns next to the cut have the smallest gaps, and so float64 products.
    late = step[:, start:].double()
    rho = outside_norms(
        pairs.x[:, start:k] + late,
        pairs.image[:, start:k] + gram(late),
        theta[start:k],
        repair.kept,
    )
    if converged:
        # No product is needed: G(X_far E) = X_far Λ E up to rounding. The rest is rounding times
        # the step, and the step times how far the kept vectors mix among themselves.
        mixing = torch.linalg.vector_norm(repair.inner[:k, inside], dim=0).double()
        skew = SAFETY * math.sqrt(d) * EPS32
        largest = float(torch.linalg.vector_norm(repair.lengths))
        rest = pairs.rounding * repair.lengths[inside] + largest * mixing
        rest += skew * torch.linalg.vector_norm(repair.residual[:, inside], dim=0)
    else:
        image = pairs.image[:, inside] + gram.rough(step[:, inside])
        rest = outside_norms(
            pairs.x[:, inside] + step[:, inside], image, theta[inside], repair.kept
        )
        rest += 2 * SAFETY * math.sqrt(n) * EPS32 * norm**2 * repair.lengths[inside]
    return torch.cat([rest, rho])


def rayleigh_ritz(x: Tensor, y: Tensor) -> Tensor:
    """Rotates x [d, q] and y = Gx to the eigenvectors of G within their span, in place; float64.

    Args:
        x: any basis, nearly orthonormal; orthonormal afterwards.
        y: [d, q].

    Returns:
        The eigenvalues [q], descending.
    """
    factor = torch.linalg.cholesky(x.mT @ x)
    half = torch.linalg.solve_triangular(factor, x.mT @ y, upper=False)
    values, vectors = torch.linalg.eigh(
        torch.linalg.solve_triangular(factor, half.mT.contiguous(), upper=False)
    )
    rotation = torch.linalg.solve_triangular(factor.mT, vectors.flip(-1), upper=True)
    for columns in (x, y):
        columns.copy_(columns @ rotation)
    eigenvalues: Tensor = values.flip(-1)
    return eigenvalues


def outside_norms(x: Tensor, image: Tensor, theta: Tensor, kept: Tensor) -> Tensor:
    """Norms of the parts of Gx − xθ that lie outside the span of `kept`."""
    r = (image - x * theta).float()
    basis = kept.float()
    norms: Tensor = torch.linalg.vector_norm((r - basis @ (basis.mT @ r)).double(), dim=0)
    return norms


def bound_span_angle(rho: Tensor, mixing: Tensor, distance: Tensor) -> float:
    """Bound on the sine of the largest angle between span(X) and the true leading eigenspace.

    GX = X(Θ + F) + R with columns ‖R_j‖ ≤ ρ_j, and P the projector on the eigenvectors dropped,
    whose eigenvalues are at most θ_j − distance_j. Z = PX solves GZ − ZΘ = PR + ZF, so
    ‖z_j‖ ≤ (ρ_j + ‖Z‖ ‖f_j‖)/distance_j, and ‖Z‖_F ≤ ‖ρ/distance‖ / (1 − ‖F/distance‖_F).

    Args:
        rho: [k].
        mixing: F [k, k].
        distance: [k].
    """
    if not bool((distance > 0).all()):
        return 1.0
    feedback = float(torch.linalg.matrix_norm(mixing / distance))
    if feedback >= 0.9:
        return 1.0
    return min(1.0, float(torch.linalg.vector_norm(rho / distance)) / (1 - feedback))


def assemble_factors(w: Tensor, norm: float, repair: Repair, angle: float) -> Refined | None:
    """Orthonormal factors from eigenvectors, all in float32; None where they are too far from it.

    Args:
        w: [d, n].
        norm: ‖w‖_F.
        repair: the eigenvectors.
        angle: bound on the sine so far, on the left.
    """
    kept, theta, residual = repair.kept, repair.theta, repair.residual
    mixing = repair.inner[: kept.shape[1]]
    k = kept.shape[1]
    s = theta[:k].sqrt()
    scale = s.float()
    images = multiply_narrow(w.mT, kept)  # [n, k]
    lost = _measure_rounding(w, norm, kept, images)
    short, left_skew, _ = _orthonormalise_columns(kept)
    # VᵀV − I = Σ⁻¹UᵀGUΣ⁻¹ − I, and what makes UᵀGU differ from Θ is known.
    known = (mixing + mixing.mT) / (2 * scale[:, None] * scale)
    long, right_skew, turned = _orthonormalise_columns(images / scale, known)
    skew = max(left_skew, right_skew)
    if not skew <= LARGEST_STEP:
        return None
    # Right: span(wᵀX) deviates by Σ_2 Z Σ_1⁻¹, less than Z does on the left; and float32 lost some.
    angle = angle / math.sqrt(max(1e-30, 1 - angle**2)) + lost / float(s[-1])
    unexplained = float((torch.linalg.vector_norm(residual, dim=0) / scale).norm())
    further = 0.0 if turned is None else float(torch.linalg.vector_norm(turned * scale))
    if bool((s.diff() > 0).any()):  # values that are equal up to rounding
        s, order = s.sort(descending=True, stable=True)
        short, long = short[:, order], long[:, order]
    return Refined(
        short=short,
        long=long,
        s=s,
        following=float(theta[k].clamp_min(0).sqrt()),
        residual=unexplained * (1 + skew) + further,
        angle=min(1.0, angle + skew + SAFETY * EPS32 * math.sqrt(k)),
    )


def _measure_rounding(w: Tensor, norm: float, x: Tensor, images: Tensor) -> float:
    """‖images − wᵀx‖_F for w [d, n], x [d, k], from a sample of the n rows and doubled.

    What float32 loses in a row is in proportion to the norm of that row of wᵀ, so a sample of rows,
    scaled by their norms, speaks for all.
    """
    every = max(1, w.shape[1] // SAMPLE)
    sample = w[:, ::every].mT.double()  # [SAMPLE, d]
    lost = torch.linalg.vector_norm(images[::every] - sample @ x.double())
    seen = torch.linalg.vector_norm(sample).clamp_min(1e-300)
    return 2 * norm * float(lost / seen)


def _orthonormalise_columns(
    x: Tensor, excess: Tensor | None = None
) -> tuple[Tensor, float, Tensor | None]:
    """x(3I − xᵀx)/2, a Newton step to the nearest orthonormal columns, where x needs one.

    Args:
        x: [m, k].
        excess: xᵀx − I to first order, where it is known.

    Returns:
        The columns, ‖xᵀx − I‖_F of them (from above), and by what less I they were multiplied,
        None if they were not; the second is NaN or large where a step was not enough.
    """
    skew = float(estimate_skew(x))
    if skew <= SKEW or not skew <= LARGEST_STEP:
        return x, skew, None
    if excess is None:
        excess = x.mT @ x
        excess.diagonal().sub_(1)
    x = torch.addmm(x, x, excess, alpha=-0.5)
    return x, float(estimate_skew(x)), excess / -2
