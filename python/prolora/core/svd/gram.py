"""Leading singular triplets by an eigensolver in float32 on the Gram matrix, then repaired.

The Gram matrix is formed in float64, which costs two products of its size in float32 and saves
those with the weight that the repair would need. The result is right wherever float32
leaves something to repair, and None elsewhere.
"""

from __future__ import annotations

from torch import Tensor

from ..rank_rule import Rank, count_columns
from .products import FormedGram, lower_gram, mirror_lower
from .refinement import Refined, Ritz, refine_triplets
from .solvers import SKEW_32, eigh_stack, estimate_skew

# Below this the eigensolver in float64 costs no more than the repair.
MIN_DIMENSION = 384


def suits_gram(d: int, rank: Rank) -> bool:
    """Whether the short side d is long enough, and something is left to cut off."""
    return d >= MIN_DIMENSION and (isinstance(rank, float) or rank < d)


def gram_triplets(w: Tensor, norm: float, rank: Rank) -> Refined | None:
    """Leading triplets of w [d, n], float32, d ≤ n; `norm` is ‖w‖_F."""
    d = w.shape[0]
    precise = mirror_lower(lower_gram(w))
    single = precise.float()
    values, vectors = eigh_stack(single)
    if not (values.isfinite().all() and estimate_skew(vectors) <= SKEW_32):
        return None
    values, vectors = values.flip(-1).double().clamp_min(0), vectors.flip(-1)
    k = int(count_columns(values.sqrt(), rank))
    if k >= d:
        return None
    p = min(d, k + max(16, min(32, k // 8)))
    ritz = Ritz(vectors[:, :p], vectors[:, p:], values, None, 0.0, converged=True)
    refined = refine_triplets(FormedGram(precise, single), w, norm, ritz, k)
    if refined is not None and isinstance(rank, float):
        # float32 may have misjudged which column is the first to reach the share.
        energies = refined.s.square().cumsum(0)
        wanted = rank * norm**2 * (1 - 1e-12)
        if energies[-1] < wanted or (k > 1 and energies[-2] >= wanted):
            return None
    return refined
