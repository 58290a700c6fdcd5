"""Leading singular triplets by a float32 eigensolver on the Gram matrix, repaired.

The Gram matrix is formed in float64, which costs two products of its size in float32 and saves
those with the weight that the repair would need. Eigenvalues far above the others are found first
and taken out of it, so that float32 resolves the rest. The result is right wherever float32 leaves
something to repair; elsewhere its angle is 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.precise_product import precise_product
from ..precision import EPS32
from ..rank_rule import Rank, count_columns
from .complement import complement_triplets
from .cut import Cut, make_cut, make_even_cut
from .head import find_head
from .products import FormedGram
from .refinement import Ritz, refine_triplets
from .solvers import descending_eigh
from .stacks import decides_freely
from .triplets import Triplets, mark_failed

# Below this the eigensolver in float64 costs no more than the repair.
MIN_DIMENSION = 384
# Over d²: a first eigenvalue above so many times the mean one behind the head is beyond float32,
# because gaps fall with the square of the columns.
STEEP = 1e9
# Beyond this share of the columns those left out are refined rather than those kept.
NEARLY_ALL = 0.6
# How often the columns that hold an energy are counted anew.
RECOUNTS = 2
# How many vectors on each side of the cut are repaired in float64: an eighth of those kept, between
# these limits, and more where the values lie close together: so many, or one for so many rows.
LEAST_GUARD = 16
USUAL_GUARD = 32
MOST_GUARD = 128
ROWS_A_GUARD = 12
# Times √d·eps·λ_1: from this distance on a first-order step repairs what float32 does.
APART = 20


def suits_gram(d: int, rank: Rank) -> bool:
    """Returns whether the short side d is long enough and something is cut off."""
    return d >= MIN_DIMENSION and (isinstance(rank, float) or rank < d)


def gram_triplets(w: Tensor, norm: Tensor, rank: Rank) -> Triplets:
    """Computes leading triplets of w [b, d, n], float32, d ≤ n; `norm` [b] is ‖w‖_F."""
    gram = FormedGram(precise_product(w))
    values, vectors, top, head = _solve_in_single(gram, w, norm)
    sound = values.isfinite().all(-1)
    values = values.nan_to_num(0.0).clamp_min(0)
    cut, fits = _find_cut(values, rank, top)
    alone = decides_freely(w) and len(w) == 1
    energy = gram.precise.diagonal(dim1=-2, dim2=-1).sum(-1)
    for _ in range(1 + RECOUNTS):
        if alone and cut.most > NEARLY_ALL * w.shape[-2] and bool(sound & fits):
            refined, held = complement_triplets(gram, w, norm, (values, vectors), cut)
        else:
            near, far = vectors[:, : cut.near], vectors[:, cut.near :]
            ritz = Ritz(near, far, values, None, torch.zeros_like(norm), head)
            refined = refine_triplets(gram, w, norm, ritz, cut, "gram-f32")
            held = refined.s.square().sum(-1)
        if not isinstance(rank, float):
            return mark_failed(refined, sound & fits)
        missing = _count_missing(held, refined.s, rank * energy, cut)
        if not alone or not missing.any() or not 1 <= cut.most + int(missing) < w.shape[-2]:
            break
        cut = make_even_cut(w, cut.most + int(missing), cut.guard)
    return mark_failed(refined, sound & fits & (missing == 0))


def _solve_in_single(
    gram: FormedGram, w: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Eigenvalues [b, d], float64, descending, and eigenvectors as rows, by float32.

    On a CPU the head of a steep spectrum is solved in float64, and lowered to twice its last value
    for float32. Returns, too, what rounding is relative to [b, 1], and the head.
    """
    d = w.shape[-2]
    head = None
    if decides_freely(w) and len(w) == 1 and bool(norm[0] > 0):
        head = find_head(gram, float(norm[0].square()), d, STEEP / d**2)
    if head is None:
        values, vectors = descending_eigh(gram.single)
        return values.double(), vectors.mT, values[:, :1].double(), None
    top = 2 * head.theta[-1]
    lowered = torch.addmm(gram.precise[0], (head.rows * (top - head.theta)[:, None]).mT, head.rows)
    values, vectors = descending_eigh(lowered.float()[None])
    values, rows = values.double(), vectors.mT.contiguous()
    values[0, : len(head.theta)], rows[0, : len(head.theta)] = head.theta, head.rows.float()
    return values, rows, top.reshape(1, 1), head.rows[None]


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
    usual = (count // 8).clamp(LEAST_GUARD, USUAL_GUARD)
    guard = torch.maximum(usual, crowd.clamp_max(max(MOST_GUARD, d // ROWS_A_GUARD))).max()
    least, most, widest = torch.stack([*count.aminmax(), guard]).tolist()
    return make_cut(count, least, most, widest, d), fits


def _count_missing(held: Tensor, s: Tensor, wanted: Tensor, cut: Cut) -> Tensor:
    """Returns [b], 1 for columns with too little energy, −1 for too much.

    They may be, because float32 counted them.

    held: [b], the energy of those kept; s: [b, k], their values; wanted: [b]; cut: how many there
    are.
    """
    enough = held >= wanted * (1 - 1e-12)
    spare = (held - cut.at(s, -1).square() >= wanted) & (cut.count > 1)
    return (~enough).long() - (enough & spare).long()
