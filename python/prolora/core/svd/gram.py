"""Leading singular triplets by an eigensolver in float32 on the Gram matrix, then repaired.

The Gram matrix is formed in float64, which costs two products of its size in float32 and saves
those with the weight that the repair would need. The result is right wherever float32 leaves
something to repair; elsewhere its angle is 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import EPS32
from ..rank_rule import Rank, count_columns
from .cut import Cut, make_cut
from .products import FormedGram, lower_gram, mirror_lower
from .refinement import Ritz, refine_triplets
from .solvers import descending_eigh
from .triplets import Triplets, mark_failed

# Below this the eigensolver in float64 costs no more than the repair.
MIN_DIMENSION = 384
# How many vectors on each side of the cut are repaired in float64: an eighth of those kept, between
# these limits, and more where the values lie close together.
LEAST_GUARD = 16
USUAL_GUARD = 32
MOST_GUARD = 128
# Times √d·eps·λ_1: from this distance on a first-order step repairs what float32 does.
APART = 20


def suits_gram(d: int, rank: Rank) -> bool:
    """Whether the short side d is long enough, and something is left to cut off."""
    return d >= MIN_DIMENSION and (isinstance(rank, float) or rank < d)


def gram_triplets(w: Tensor, norm: Tensor, rank: Rank) -> Triplets:
    """Leading triplets of w [b, d, n], float32, d ≤ n; `norm` [b] is ‖w‖_F."""
    gram = FormedGram(mirror_lower(lower_gram(w)))
    values, vectors = descending_eigh(gram.single)
    vectors = vectors.mT  # rows, [b, d, d]
    sound = values.isfinite().all(-1)
    values = values.nan_to_num(0.0).double().clamp_min(0)
    cut, fits = _find_cut(values, rank)
    near, far = vectors[:, : cut.near], vectors[:, cut.near :]
    ritz = Ritz(near, far, values, None, torch.zeros_like(norm))
    refined = refine_triplets(gram, w, norm, ritz, cut, "gram-f32")
    if isinstance(rank, float):
        fits &= _holds_share(refined.s, norm, rank, cut)
    return mark_failed(refined, sound & fits)


def _find_cut(values: Tensor, rank: Rank) -> tuple[Cut, Tensor]:
    """Where eigenvalues [b, d] are cut, and for which matrices it leaves something behind.

    It costs one synchronisation: the host must know the numbers of columns.
    """
    d = values.shape[-1]
    count = count_columns(values.sqrt(), rank)
    fits = count < d
    count = count.clamp_max(d - 1)
    last = values.gather(-1, (count - 1).clamp_min(0)[:, None])
    near = last - values < APART * math.sqrt(d) * EPS32 * values[:, :1]
    crowd = (near & (torch.arange(d, device=values.device) >= count[:, None])).sum(-1)
    usual = (count // 8).clamp(LEAST_GUARD, USUAL_GUARD)
    guard = torch.maximum(usual, crowd.clamp_max(MOST_GUARD)).max()
    least, most, widest = torch.stack([*count.aminmax(), guard]).tolist()
    return make_cut(count, least, most, widest, d), fits


def _holds_share(s: Tensor, norm: Tensor, rank: float, cut: Cut) -> Tensor:
    """Whether the last of the values s [b, k] is the first to reach the share of energy: bool [b].

    It may not be, because float32 counted the columns.
    """
    energies = s.square().cumsum(-1)
    wanted = rank * norm.square() * (1 - 1e-12)
    before = torch.where(cut.count > 1, cut.at(energies, -2), 0.0)
    return (cut.at(energies, -1) >= wanted) & (before < wanted)
