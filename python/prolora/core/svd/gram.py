"""Leading singular triplets by a float32 eigensolver on the Gram matrix, repaired.

This is the solver of a GPU, where float64 is slow and the eigenproblem goes to cuSOLVER. The Gram
matrix is formed in float64, which costs two products of its size in float32 and saves those with
the weight that the repair would need. If float32 leaves too little to repair, the angle is 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import EPS32
from ..rank_rule import Rank, count_columns
from .cut import Cut, make_cut
from .products import FormedGram
from .refinement import Ritz, refine_triplets
from .solvers import descending_eigh
from .triplets import Triplets, mark_failed
from .tuning import TUNING

# Times √d·eps·λ_1: from this distance on a first-order step repairs what float32 does.
APART = 20


def suits_gram(d: int, rank: Rank) -> bool:
    """Returns whether the short side d is long enough and something is cut off."""
    return d >= TUNING.gram_rows and (isinstance(rank, float) or rank < d)


def gram_triplets(w: Tensor, norm: Tensor, rank: Rank) -> Triplets:
    """Computes leading triplets of w [b, d, n], float32, d ≤ n; `norm` [b] is ‖w‖_F."""
    gram = FormedGram.of(w)
    single, vectors = descending_eigh(gram.single)
    values, rows, top = single.double(), vectors.mT, single[:, :1].double()
    sound = values.isfinite().all(-1)
    values = values.nan_to_num(0.0).clamp_min(0)
    cut, fits = _find_cut(values, rank, top)
    near, far = rows[:, : cut.near], rows[:, cut.near :]
    ritz = Ritz(near, far, values, None, torch.zeros_like(norm))
    refined = refine_triplets(gram, w, norm, ritz, cut, "gram-f32")
    if not isinstance(rank, float):
        return mark_failed(refined, sound & fits)
    energy = gram.precise.diagonal(dim1=-2, dim2=-1).sum(-1)
    missing = _count_missing(refined.s.square().sum(-1), refined.s, rank * energy, cut)
    return mark_failed(refined, sound & fits & (missing == 0))


def _find_cut(values: Tensor, rank: Rank, top: Tensor) -> tuple[Cut, Tensor]:
    """Cuts eigenvalues [b, d], and returns for which matrices something lies behind.

    It costs one synchronisation: the host must know the numbers of columns. Rounding was relative
    to `top` [b, 1].
    """
    d = values.shape[-1]
    count = count_columns(values.sqrt(), rank)
    fits = count < d
    count = count.clamp_max(d - 1)
    last = values.gather(-1, (count - 1).clamp_min(0)[:, None])
    near = (last - values).abs() < APART * math.sqrt(d) * EPS32 * top
    behind = torch.arange(d, device=values.device) >= count[:, None]
    crowd = torch.maximum((near & behind).sum(-1), (near & ~behind).sum(-1))
    usual = (count // 8).clamp(TUNING.least_guard, TUNING.usual_guard)
    guard = torch.maximum(
        usual, crowd.clamp_max(max(TUNING.most_guard, d // TUNING.rows_per_guard))
    ).max()
    least, most, widest = torch.stack([*count.aminmax(), guard]).tolist()
    return make_cut(count, least, most, widest, d), fits


def _count_missing(energy: Tensor, s: Tensor, wanted: Tensor, cut: Cut) -> Tensor:
    """Counts the columns [b] that are missing for an energy: 1, 0, or −1 for a spare one."""
    enough = energy >= wanted * (1 - 1e-12)
    spare = (energy - cut.at(s, -1).square() >= wanted) & (cut.count > 1)
    return (~enough).long() - (enough & spare).long()
