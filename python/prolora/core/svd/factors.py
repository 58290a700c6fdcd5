"""Orthonormal singular vectors from refined eigenvectors of the short side."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.precise_product import precise_product
from ..precision import EPS32
from ..symmetric import lower_gram, mirror_lower
from .cut import Cut
from .solvers import PROBES, estimate_skew, random_probes
from .stacks import is_on_host

# Times √columns·eps: what storing the factors in float32 may move their span.
SAFETY = 4
# A first-order step, or a deviation of VᵀV from I, beyond this is not small.
LARGEST_STEP = 0.1
# Columns of w that the rounding of a product is measured on.
SAMPLE = 48
# Rows this close to orthonormal (Frobenius, doubled) are as good as LAPACK's in float32.
SKEW = 1e-4


@dataclass(frozen=True)
class Known:
    """What a refinement has found out about its eigenvectors x."""

    theta: Tensor  # [b, k], float64, their eigenvalues; 0 beyond the count
    mixing: Tensor  # [b, k, k], the share of xG − θx in their span
    residual: Tensor  # [b, k, d], xG − θx


def assemble_factors(
    w: Tensor, norm: Tensor, kept: Tensor, angle: Tensor, cut: Cut, known: Known | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes orthonormal factors from eigenvectors, all in float32.

    w: [b, d, n]; norm: [b], ‖w‖_F; kept: [b, k, d], the eigenvectors; zero rows beyond the count;
    angle: [b], bound on the sine so far, on the left; cut: how many there are; known: what need not
    be found from their images. Returns rows [b, k, d] of the short side, s [b, k], rows [b, k, n]
    of the long side; [b], bounds on the residual and on the sine on both sides, the latter 1 where
    nothing is known.
    """
    used = None if cut.uniform else cut.kept
    images = kept @ w  # [b, k, n]
    if known is None:
        s = torch.linalg.vector_norm(images, dim=-1).double()
    else:
        s = known.theta.clamp_min(0).sqrt()
    scale = (s if used is None else torch.where(used, s, 1.0)).float()
    lost = _measure_rounding(w, norm, kept, images)
    short, left_skew, _ = _orthonormalise_rows(kept, used)
    excess = None
    if known is not None:
        # VVᵀ − I = Σ⁻¹UGUᵀΣ⁻¹ − I, and what makes UGUᵀ differ from Θ is known.
        excess = (known.mixing + known.mixing.mT) / (2 * scale[..., None] * scale[:, None])
    long, right_skew, turned = _orthonormalise_rows(images.div_(scale[..., None]), used, excess)
    skew = torch.maximum(left_skew, right_skew)
    # Right: span(Xw) deviates by Σ_1⁻¹ Z Σ_2, less than Z does on the left; and float32 lost some.
    angle = angle / (1 - angle.square()).clamp_min(1e-30).sqrt() + lost / cut.at(s, -1)
    angle = angle + skew + SAFETY * EPS32 * cut.count.double().sqrt()
    if known is None:
        residual, _ = sample_residual(w, short, s, long)
    else:
        unexplained = torch.linalg.vector_norm(known.residual, dim=-1) / scale
        residual = torch.linalg.vector_norm(unexplained, dim=-1).double() * (1 + skew)
        if turned is not None:
            residual += torch.linalg.vector_norm(turned * scale[:, None], dim=(-2, -1))
    angle = torch.where(skew <= LARGEST_STEP, angle, 1.0).nan_to_num(1.0).clamp_max(1)
    return *_sort_rows(short, s, long), residual, angle


def sample_residual(w: Tensor, short: Tensor, s: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates the larger of ‖wv − su‖_F and ‖wᵀu − sv‖_F, and ‖(wᵀu − sv)/s‖_F.

    Both are [b], over all rows, and from above, by random combinations of the rows.
    """
    probes = random_probes(s.shape[-1], PROBES, w.dtype, w.device).mT.expand(len(w), -1, -1)
    single = s.float()[:, None]
    scaled = probes * single
    left = (probes @ long) @ w.mT - scaled @ short
    right = (probes @ short) @ w - scaled @ long
    outside = (probes / single @ short) @ w - probes @ long
    norms = torch.stack([torch.linalg.vector_norm(x, dim=(-2, -1)) for x in (left, right, outside)])
    norms = norms.double() * (2 / math.sqrt(PROBES))
    return norms[:2].amax(0), norms[2]


def _sort_rows(short: Tensor, s: Tensor, long: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts by descending value; only values that are equal up to rounding move."""
    if is_on_host(s) and not bool((s.diff() > 0).any()):
        return short, s, long
    s, order = s.sort(descending=True, stable=True)
    short, long = (x.gather(1, order[..., None].expand_as(x)) for x in (short, long))
    return short, s, long


def _measure_rounding(w: Tensor, norm: Tensor, x: Tensor, images: Tensor) -> Tensor:
    """Estimates ‖images − xw‖_F [b] from a sample of the n columns, doubled.

    x is [b, k, d], w [b, d, n]. What float32 loses in a column is in proportion to the norm of that
    column of w, so a sample of columns, scaled by their norms, speaks for all.
    """
    every = max(1, w.shape[-1] // SAMPLE)
    sample = w[..., ::every].double()  # [b, d, SAMPLE]
    missed = images[..., ::every] - precise_product(x, sample.mT)
    seen = torch.linalg.vector_norm(sample, dim=(-2, -1)).clamp_min(1e-300)
    lost: Tensor = 2 * norm * torch.linalg.vector_norm(missed, dim=(-2, -1)) / seen
    return lost


def _orthonormalise_rows(
    x: Tensor, used: Tensor | None, excess: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Takes the Newton step (3I − xxᵀ)x/2 to orthonormal rows, where one is needed.

    x: [b, k, m]; used: bool [b, k], the rows in use; the others are zero; excess: xxᵀ − I to first
    order, where it is known. Returns the rows, ‖xxᵀ − I‖_F of them [b] (from above), and by what
    less I they were multiplied, None if none was; the second is NaN or large where a step was not
    enough.
    """
    skew = estimate_skew(x.mT, used)
    needed = (skew > max(SKEW, x.shape[-1] * EPS32)) & (skew <= LARGEST_STEP)
    if is_on_host(x) and not bool(needed.any()):
        return x, skew, None
    if excess is None:
        excess = mirror_lower(lower_gram(x, x.dtype))
        excess.diagonal(dim1=-2, dim2=-1).sub_(1 if used is None else used.to(x.dtype))
    change = torch.where(needed[:, None, None], excess / -2, 0.0)
    x = torch.baddbmm(x, change, x)
    return x, torch.where(needed, estimate_skew(x.mT, used), skew), change
