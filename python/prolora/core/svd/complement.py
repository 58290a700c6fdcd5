"""Nearly all singular triplets, from the few that are left out.

The leading eigenspace of G is what is orthogonal to the trailing one. So where little is left out
only that is refined and proven, as the leading eigenspace of −G, and taken out of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cut import Cut, make_even_cut
from .factors import assemble_factors
from .products import FormedGram
from .refinement import Ritz, refine_span
from .triplets import Triplets


def complement_triplets(
    gram: FormedGram, w: Tensor, norm: Tensor, pairs: tuple[Tensor, Tensor], cut: Cut
) -> tuple[Triplets, Tensor]:
    """Returns the leading triplets of one matrix w [1, d, n], and their energy [1].

    gram: products with wwᵀ; w: float32, d ≤ n; norm: [1], ‖w‖_F; pairs: eigenvalues [1, d],
    descending, float64, and eigenvectors as rows, float32: all; cut: how many to keep.
    """
    values, vectors = pairs
    d, k = w.shape[1], cut.most
    left_out = make_even_cut(w, d - k, cut.guard)
    values, turned = -values.flip(1), vectors.flip(1)
    near, far = turned[:, : left_out.near], turned[:, left_out.near :]
    ritz = Ritz(near, far, values, None, torch.zeros_like(norm))
    negated = FormedGram(-gram.precise, gram.error)
    refined, repair, angle = refine_span(negated, norm, ritz, left_out, sum(w.shape[-2:]))
    tail, theta = repair.kept, refined.theta[:, : d - k]
    # Those next to the cut have been turned with those behind it.
    beside = refined.x[:, d - k : left_out.near].float().flip(1)
    kept = torch.cat([vectors[:, : k - beside.shape[1]], beside], 1)
    kept = torch.baddbmm(kept, kept @ tail.mT, tail, alpha=-1)
    touched = torch.linalg.vector_norm((kept @ tail.mT).double(), dim=(-2, -1))
    short, s, long, residual, angle = assemble_factors(w, norm, kept, angle + touched, cut)
    following = (-theta[:, -1]).clamp_min(0).sqrt()
    energy = gram.precise.diagonal(dim1=-2, dim2=-1).sum(-1) + theta.sum(-1)
    solvers = ("gram-f32",)
    return Triplets(short.mT, long.mT, s, cut.count, following, residual, angle, solvers), energy
