"""How far refined eigenvectors can be from the true leading subspace: bounds from residuals.

For stacks of matrices G [d, d], with vectors as rows, and without a decision of the host: where a
bound does not exist it becomes infinite, NaN or 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cut import Cut
from .products import AnyGram
from .solvers import FEW_PROBES, random_probes

# What random combinations of rows show of a norm is taken times this. Where one row alone is wrong,
# 16 of them show less than a quarter with a chance of 1e-7; where several are, less often.
CAUTION = 4
# Beyond this a feedback of the kept vectors on each other leaves no bound.
LARGEST_FEEDBACK = 0.9


@dataclass(frozen=True)
class Pairs:
    """Ritz pairs (x, θ) of G in float64, and their residuals."""

    x: Tensor  # [b, p, d]
    theta: Tensor  # [b, p]
    residual: Tensor  # xG − θx [b, p, d]
    squares: Tensor  # ‖xG − θx‖² [b, p]
    rounding: Tensor  # [b], ‖xG − θx‖_F over all d eigenvectors, as estimated


@dataclass(frozen=True)
class Repair:
    """The kept vectors after a first-order step, in float32; zero rows beyond the count."""

    kept: Tensor  # [b, k, d]
    step: Tensor  # [b, k, d], by which they were moved
    lengths: Tensor  # [b, k], float64, of the rows of `step`
    residual: Tensor  # [b, k, d], xG − θx before the step
    mixing: Tensor  # [b, k, k], its share in the span of the kept ones


def bound_dropped(pairs: Pairs, outside: Tensor, cut: Cut) -> Tensor:
    """Bounds the eigenvalues behind the cut from above: [b], rounding aside.

    By Courant & Fischer none exceeds the first one of G on the complement of those kept, whose
    blocks are coupled by the residuals.

    pairs: the kept ones and more; outside: [b], upper bound on the eigenvalues outside their span;
    cut: how many are kept.
    """
    column = torch.arange(cut.near, device=outside.device)
    behind_cut = (column >= cut.count[:, None]) & (column < cut.end[:, None])
    theta = cut.at(pairs.theta, 0)
    distance = theta - outside
    coupling = torch.where(behind_cut, pairs.squares, 0.0).sum(-1)
    above = torch.maximum(theta, outside) + coupling.sqrt()
    return torch.where(distance > 0, torch.minimum(above, theta + coupling / distance), above)


def measure_residuals(
    gram: AnyGram,
    pairs: Pairs,
    repair: Repair,
    distance: Tensor,
    cut: Cut,
) -> tuple[Tensor, Tensor]:
    """Measures what `bound_span_angle` asks of the repaired vectors: [b], [b].

    Products are in float64. Those next to the cut are multiplied one by one; of the others, random
    combinations: a few, because on many GPUs float64 takes 64 times as long as float32.

    gram: products with G; pairs: before the repair; repair: the vectors; distance: [b, k], of their
    eigenvalues to those dropped; infinite for rows not in use; cut: how many are kept.
    """
    x, step, theta = pairs.x[:, : cut.most], repair.step, pairs.theta[:, : cut.most]
    late, count = cut.window(x, cut.late) + cut.window(step, cut.late), cut.late
    early = torch.arange(cut.most, device=x.device) < cut.start[:, None]
    probes = random_probes(cut.most, FEW_PROBES, x.dtype, x.device).mT
    probes = probes * torch.where(early, 1 / distance, 0.0)[:, None]
    both = torch.cat([probes, probes * theta[:, None]], 1)
    weights = both.float()
    mixed, scaled = torch.baddbmm((weights @ step).double(), both, x).chunk(2, 1)
    left = gram(torch.cat([late, mixed], 1))
    left[:, :count].addcmul_(late, cut.window(theta, count)[..., None], value=-1)
    left[:, count:] -= scaled
    left = left.float()
    inside = left @ repair.kept.mT
    lengths = torch.linalg.vector_norm((left - inside @ repair.kept).double(), dim=-1)
    near = cut.window(distance, count)
    sines = lengths[:, :count] / near
    place = cut.start[:, None] + torch.arange(count, device=x.device)
    sines = torch.where(place < cut.most, sines, 0.0)  # the last row may come several times
    unknown = (inside[:, count:] - weights[:, :FEW_PROBES] @ repair.mixing).double()
    turned = (inside[:, :count] - cut.window(repair.mixing, count)).double()
    turned = torch.where((place < cut.most)[..., None], turned / near[..., None], 0.0)
    sampled = CAUTION / math.sqrt(FEW_PROBES)
    parts = [sines, sampled * lengths[:, count:]]
    missed = torch.linalg.vector_norm(torch.cat(parts, 1), dim=-1)
    rotation = torch.linalg.vector_norm(repair.mixing / distance[..., None], dim=(-2, -1))
    largest = torch.linalg.vector_norm(repair.lengths, dim=-1)
    feedback = rotation * (1 + largest).square()
    feedback += torch.linalg.vector_norm(turned, dim=(-2, -1))
    feedback += sampled * torch.linalg.vector_norm(unknown, dim=(-2, -1))
    return missed, feedback


def bound_span_angle(missed: Tensor, feedback: Tensor, distance: Tensor) -> Tensor:
    """Bounds the sine [b] of the largest angle between span(X) and the leading eigenspace.

    XG = (Θ + F)X + R with rows ‖R_j‖ ≤ ρ_j, and P the projector on the eigenvectors dropped,
    whose eigenvalues are at most θ_j − distance_j. Z = XP solves ZG − ΘZ = RP + FZ, so
    ‖z_j‖ ≤ (ρ_j + ‖Z‖ ‖f_j‖)/distance_j, and ‖Z‖_F ≤ ‖ρ/distance‖ / (1 − ‖F/distance‖_F).

    missed: [b], ‖ρ/distance‖; feedback: [b], ‖F/distance‖_F; distance: [b, k]; infinite for rows
    that are not in use.
    """
    holds = (distance > 0).all(-1) & (feedback < LARGEST_FEEDBACK)
    return torch.where(holds, (missed / (1 - feedback)).clamp_max(1), 1.0)
