"""Singular triplets good to float64's bounds from vectors that only float32 was spent on.

An eigensolver or a Krylov iteration in float32 leaves an error of about eps32·λ_1/gap in the
leading eigenspace of G = wwᵀ: too much where the spectrum is dense. It is repaired to first order
here, for one product with w in float64 and a few in float32:

1. Residuals R = GX − XΘ in float64. They are as small as float32's rounding, so float32 then holds
   them to seven digits, and everything derived from them may run in float32.
2. Rayleigh-Ritz in float64 in a window around the cut at k, where neighbours are too close for a
   first-order formula.
3. For every other pair of a kept j and a dropped i: x_j += x_i (x_iᵀr_j)/(θ_j − θ_i), which solves
   the invariance equation of the subspace to first order: the error is squared.

Pairs that are both kept are left alone, for they change the vectors but not their span. The bound
rests on the residuals of what is returned (`span_angle`), so a step that failed is seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import EPS, EPS32
from .products import times
from .triplets import Triplets

# Times √length·eps: the rounding of float32 products that are not measured.
SAFETY = 4
# A first-order step, or a deviation of VᵀV from I, beyond this is not small.
LARGEST_STEP = 0.1
# Columns this close to orthonormal (Frobenius) are as good as LAPACK's in float32.
SKEW = 5e-5


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
        """As a stack of one."""
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


def refine(w: Tensor, single: Tensor, norm: float, ritz: Ritz, k: int) -> Refined | None:
    """The k leading triplets of w [d, n], d ≤ n, or None where float32 left too little to repair.

    Args:
        w: float64.
        single: w in float32, exactly equal to it.
        norm: ‖w‖_F.
        ritz: with k < p.
        k: columns to return.
    """
    d, n = w.shape
    p = ritz.near.shape[1]
    start = max(0, 2 * k - p)  # the window [start, p) has the cut in its middle
    floor = 10 * (d + n) * EPS * norm**2

    x = ritz.near.double()  # [d, p]
    t = times(w.mT, x)  # [n, p]
    y = times(w, t)  # [d, p], Gx
    theta = (x * y).sum(0)
    r = torch.addcmul(y, x, theta, value=-1)
    # What rounding did to p of d eigenvectors, extrapolated to all of them and doubled.
    rounding = 2 * math.sqrt(d / p) * float(torch.linalg.matrix_norm(r))
    theta[start:] = rayleigh_ritz(x[:, start:], t[:, start:], y[:, start:])
    r[:, start:] = torch.addcmul(y[:, start:], x[:, start:], theta[start:], value=-1)
    if not theta[k - 1] > theta[k] > 0:
        return None
    values = torch.cat([theta, ritz.values[p:]])
    # The largest eigenvalue outside `near`, and so of all that is dropped (Courant & Fischer).
    outside = float(values[p]) + ritz.error + rounding if p < len(values) else 0.0
    behind = float(theta[k]) - outside
    if behind <= 0:
        return None
    ceiling = float(theta[k]) + float(r[:, k:].square().sum()) / behind + floor

    near, residual = x.float(), r[:, :k].float()
    inner = near.mT @ residual  # [p, k]
    step = _first_order(near, residual, inner, values, ritz, k, start)
    lengths = torch.linalg.vector_norm(step, dim=0).double()
    largest = float(torch.linalg.vector_norm(lengths))
    if not largest <= LARGEST_STEP:
        return None
    kept = near[:, :k] + step
    inside = slice(0, start)
    move = times(single.mT, step[:, inside])
    images = [t[:, inside].float() + move]
    lost = SAFETY * math.sqrt(n) * EPS32 * norm * lengths[inside]  # what float32 loses of `move`

    # The columns next to the cut have the smallest gaps, and so float64 products.
    window = x[:, start:k] + step[:, start:]
    precise = times(w.mT, step[:, start:].double())
    images.append((t[:, start:k] + precise).float())
    rho = left_over(window, y[:, start:k] + times(w, precise), theta[start:k], kept)
    if ritz.converged:
        # Known without a product: G(X_far E) = X_far Λ E up to rounding, so that what is left is
        # rounding times the step, and the step times what the kept vectors mix among themselves.
        mixing = torch.linalg.vector_norm(inner[:k, inside], dim=0).double()
        skew = SAFETY * math.sqrt(d) * EPS32
        rest = rounding * lengths[inside] + largest * mixing
        rest += skew * torch.linalg.vector_norm(residual[:, inside], dim=0)
    else:
        image = y[:, inside] + times(single, move)
        rest = left_over(x[:, inside] + step[:, inside], image, theta[inside], kept)
        rest += 2 * norm * lost
    angle = span_angle(
        torch.cat([rest, rho]) + floor / math.sqrt(k),
        inner[:k].double() * (1 + largest) ** 2,
        theta[:k] - ceiling,
    )
    lost_in_all = float(torch.linalg.vector_norm(lost))
    return assembled(kept, torch.cat(images, 1), theta, residual, angle, lost_in_all)


def rayleigh_ritz(x: Tensor, *images: Tensor) -> Tensor:
    """Rotates x [d, q] to the eigenvectors of G within its span, in place; float64.

    Args:
        x: any basis, nearly orthonormal; orthonormal afterwards.
        images: wᵀx first, then what else is to be rotated along.

    Returns:
        The eigenvalues [q], descending.
    """
    factor = torch.linalg.cholesky(x.mT @ x)
    inner = images[0].mT @ images[0]
    half = torch.linalg.solve_triangular(factor, inner, upper=False)
    values, vectors = torch.linalg.eigh(
        torch.linalg.solve_triangular(factor, half.mT.contiguous(), upper=False)
    )
    rotation = torch.linalg.solve_triangular(factor.mT, vectors.flip(-1), upper=True)
    for columns in (x, *images):
        columns.copy_(columns @ rotation)
    eigenvalues: Tensor = values.flip(-1)
    return eigenvalues


def _first_order(
    near: Tensor, residual: Tensor, inner: Tensor, values: Tensor, ritz: Ritz, k: int, start: int
) -> Tensor:
    """The step of the kept vectors towards the dropped ones: [d, k]."""
    p = near.shape[1]
    theta = values[:k]
    behind = inner[k:] / (theta - values[k:p, None]).float()
    behind[:, start:] = 0  # Rayleigh-Ritz has seen to these
    coupling = ritz.far.mT @ residual  # [q, k]
    step = near[:, k:] @ behind
    step = torch.addmm(step, ritz.far, coupling / (theta - values[p:, None]).float())
    if ritz.beyond is not None:
        rest = residual - near @ inner - ritz.far @ coupling
        step += rest / (theta - ritz.beyond).float()
    return step


def left_over(x: Tensor, image: Tensor, theta: Tensor, kept: Tensor) -> Tensor:
    """Norms of the parts of Gx − xθ that lie outside the span of `kept`."""
    r = (image - x * theta).float()
    basis = kept.float()
    norms: Tensor = torch.linalg.vector_norm((r - basis @ (basis.mT @ r)).double(), dim=0)
    return norms


def span_angle(rho: Tensor, mixing: Tensor, distance: Tensor) -> float:
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


def assembled(
    kept: Tensor, images: Tensor, theta: Tensor, residual: Tensor, angle: float, lost: float
) -> Refined | None:
    """Orthonormal factors from eigenvectors [d, k] and their images wᵀx [n, k], both float32."""
    k = kept.shape[1]
    s = theta[:k].sqrt()
    short, left_skew, _ = _orthonormalised(kept)
    long, right_skew, turned = _orthonormalised(images / s.float())
    skew = max(left_skew, right_skew)
    if not skew <= LARGEST_STEP:
        return None
    # Right: span(wᵀX) deviates by Σ_2 Z Σ_1⁻¹, less than Z does on the left; and float32 lost some.
    angle = angle / math.sqrt(max(1e-30, 1 - angle**2)) + lost / float(s[-1])
    unexplained = float(torch.linalg.matrix_norm(residual / s.float()))
    further = float(torch.linalg.matrix_norm(turned * s))
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


def _orthonormalised(x: Tensor) -> tuple[Tensor, float, Tensor]:
    """x(3I − xᵀx)/2, a Newton step to the nearest orthonormal columns, where x needs one.

    Returns:
        The columns, a bound on ‖xᵀx − I‖_F of them, and by what less I they were multiplied; the
        bound is NaN or above LARGEST_STEP where a step would not have been enough.
    """
    excess = x.mT @ x
    excess.diagonal().sub_(1)
    skew = float(torch.linalg.matrix_norm(excess.double()))
    if skew <= SKEW or not skew <= LARGEST_STEP:
        return x, skew, torch.zeros_like(excess)
    return x - x @ (excess / 2), skew**2, -excess / 2
