"""How far refined eigenvectors can be from the true leading subspace: bounds from residuals.

For stacks of matrices G [d, d], with vectors as rows, and without a decision of the host: where a
bound does not exist it becomes infinite, NaN or 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import EPS32
from .cut import Cut
from .products import FormedGram, ImpliedGram

# Times √length·eps: the rounding of float32 products that are not measured.
SAFETY = 4
# Beyond this a feedback of the kept vectors on each other leaves no bound.
LARGEST_FEEDBACK = 0.9


@dataclass(frozen=True)
class Pairs:
    """Ritz pairs (x, θ) of G in float64, and how far they are from eigenpairs.

    Attributes:
        x: [b, p, d].
        image: xG [b, p, d].
        theta: [b, p].
        residual: xG − θx [b, p, d].
        squares: ‖xG − θx‖² [b, p].
        rounding: [b], ‖xG − θx‖_F over all d eigenvectors, as estimated.
    """

    x: Tensor
    image: Tensor
    theta: Tensor
    residual: Tensor
    squares: Tensor
    rounding: Tensor


@dataclass(frozen=True)
class Repair:
    """The kept vectors after a first-order step, in float32; zero rows beyond the count.

    Attributes:
        kept: [b, k, d].
        step: [b, k, d], by which they were moved.
        lengths: [b, k], float64, of the rows of `step`.
        residual: [b, k, d], xG − θx before the step.
        mixing: [b, k, k], its share in the span of the kept ones.
    """

    kept: Tensor
    step: Tensor
    lengths: Tensor
    residual: Tensor
    mixing: Tensor


def bound_dropped(pairs: Pairs, outside: Tensor, cut: Cut) -> Tensor:
    """[b], upper bound on the eigenvalues behind the cut, rounding aside; NaN where there is none.

    By Courant & Fischer none outside the span of the pairs exceeds the first one there.

    Args:
        pairs: the kept ones and more.
        outside: [b], upper bound on the eigenvalues outside their span.
        cut: how many are kept.
    """
    column = torch.arange(cut.near, device=outside.device)
    behind_cut = (column >= cut.count[:, None]) & (column < cut.end[:, None])
    theta = cut.at(pairs.theta, 0)
    distance = theta - outside
    bound = theta + torch.where(behind_cut, pairs.squares, 0.0).sum(-1) / distance
    return torch.where(distance > 0, bound, torch.nan)


def bound_residuals(
    gram: FormedGram | ImpliedGram, pairs: Pairs, repair: Repair, rough: Tensor | None, cut: Cut
) -> Tensor:
    """[b, k], bounds on the residuals of the repaired vectors outside of their span.

    Args:
        gram: products with G.
        pairs: before the repair.
        repair: the vectors.
        rough: [b], the error of a float32 product of G and a vector of length 1; None where the
            step was made of eigenvectors up to rounding, so that no product is needed.
        cut: how many are kept; as many of every matrix where `rough` is given.
    """
    # The vectors next to the cut have the smallest gaps, and so products in float64: a few, because
    # on many GPUs these take 64 times as long as those in float32.
    late = cut.window(repair.step, cut.late).double()
    x, image, theta = (cut.window(of, cut.late) for of in (pairs.x, pairs.image, pairs.theta))
    near_cut = outside_norms(x + late, image + gram(late), theta, repair.kept)
    if rough is None:
        bounds = _bound_first_residuals(pairs, repair)
    else:
        first = slice(0, cut.first)
        step = repair.step[:, first]
        image = pairs.image[:, first] + gram.rough(step)
        bounds = outside_norms(pairs.x[:, first] + step, image, pairs.theta[:, first], repair.kept)
        bounds += rough[:, None] * repair.lengths[:, first]
    if cut.uniform:
        return torch.cat([bounds[:, : cut.first], near_cut], dim=1)
    padded: Tensor = torch.nn.functional.pad(bounds, (0, 2 * cut.guard))
    cut.put(padded, near_cut)
    return padded[:, : cut.most]


def _bound_first_residuals(pairs: Pairs, repair: Repair) -> Tensor:
    """[b, k], the bounds of `bound_residuals` where G(step) is known up to rounding.

    G(E X_far) = E Λ X_far. What is left is rounding times the step, and the step times how far the
    kept vectors mix among themselves.
    """
    mixing = torch.linalg.vector_norm(repair.mixing, dim=-1).double()
    skew = SAFETY * math.sqrt(repair.kept.shape[-1]) * EPS32
    largest = torch.linalg.vector_norm(repair.lengths, dim=-1, keepdim=True)
    bounds: Tensor = pairs.rounding[:, None] * repair.lengths + largest * mixing
    bounds += skew * torch.linalg.vector_norm(repair.residual, dim=-1)
    return bounds


def outside_norms(x: Tensor, image: Tensor, theta: Tensor, kept: Tensor) -> Tensor:
    """[b, c], norms of the parts of xG − θx [b, c, d] that lie outside the span of `kept`."""
    r = torch.addcmul(image, x, theta[..., None], value=-1).float()
    norms: Tensor = torch.linalg.vector_norm((r - (r @ kept.mT) @ kept).double(), dim=-1)
    return norms


def bound_span_angle(rho: Tensor, mixing: Tensor, distance: Tensor) -> Tensor:
    """[b], bound on the sine of the largest angle between span(X) and the true leading eigenspace.

    XG = (Θ + F)X + R with rows ‖R_j‖ ≤ ρ_j, and P the projector on the eigenvectors dropped,
    whose eigenvalues are at most θ_j − distance_j. Z = XP solves ZG − ΘZ = RP + FZ, so
    ‖z_j‖ ≤ (ρ_j + ‖Z‖ ‖f_j‖)/distance_j, and ‖Z‖_F ≤ ‖ρ/distance‖ / (1 − ‖F/distance‖_F).

    Args:
        rho: [b, k].
        mixing: F [b, k, k].
        distance: [b, k]; infinite for rows that are not in use.
    """
    feedback = torch.linalg.vector_norm(mixing / distance[..., None], dim=(-2, -1))
    sine = torch.linalg.vector_norm(rho / distance, dim=-1) / (1 - feedback)
    holds = (distance > 0).all(-1) & (feedback < LARGEST_FEEDBACK)
    return torch.where(holds, sine.clamp_max(1), 1.0)
