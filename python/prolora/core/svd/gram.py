"""Leading singular triplets by a float32 eigensolver on the Gram matrix, repaired.

The Gram matrix is formed in float64, which costs two products of its size in float32 and saves
those with the weight that the repair would need. Eigenvalues far above the others are found first
and taken out of it, so that float32 resolves the rest. The result is right wherever float32 leaves
something to repair; elsewhere its angle is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import EPS32
from ..rank_rule import Rank, count_columns
from .complement import complement_triplets
from .cut import Cut, make_cut, make_even_cut
from .head import LeadingPairs, find_head
from .partial import Reduced, solves_partially
from .products import FormedGram
from .refinement import Ritz, refine_triplets
from .solvers import descending_eigh
from .stacks import is_on_host
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
    lowered = _lower_head(gram, w, norm)
    few = partial_triplets(gram, w, norm, rank, lowered)
    if few is not None:
        return few
    values, vectors, top, head = _solve_in_single(gram, lowered)
    sound = values.isfinite().all(-1)
    values = values.nan_to_num(0.0).clamp_min(0)
    cut, fits = _find_cut(values, rank, top)
    alone = is_on_host(w) and len(w) == 1
    energy = gram.precise.diagonal(dim1=-2, dim2=-1).sum(-1)
    for _ in range(1 + TUNING.recounts):
        if alone and cut.most > TUNING.complement_share * w.shape[-2] and bool(sound & fits):
            refined, total = complement_triplets(gram, w, norm, (values, vectors), cut)
        else:
            near, far = vectors[:, : cut.near], vectors[:, cut.near :]
            ritz = Ritz(near, far, values, None, torch.zeros_like(norm), head)
            refined = refine_triplets(gram, w, norm, ritz, cut, "gram-f32")
            total = refined.s.square().sum(-1)
        if not isinstance(rank, float):
            return mark_failed(refined, sound & fits)
        missing = _count_missing(total, refined.s, rank * energy, cut)
        if not alone or not missing.any() or not 1 <= cut.most + int(missing) < w.shape[-2]:
            break
        cut = make_even_cut(w, cut.most + int(missing), cut.guard)
    return mark_failed(refined, sound & fits & (missing == 0))


@dataclass(frozen=True)
class Lowered:
    """Gram matrix of a steep spectrum with its head lowered, for float32."""

    single: Tensor  # [1, d, d]
    head: LeadingPairs
    top: Tensor  # [1, 1], what rounding is relative to

    def restore(self, values: Tensor, rows: Tensor) -> None:
        """Overwrites the leading eigenvalues [1, p] and eigenvectors [1, p, d] with the head."""
        q = min(len(self.head.theta), rows.shape[1])  # the head may be longer than p
        values[0, :q], rows[0, :q] = self.head.theta[:q], self.head.rows[:q].float()


def partial_triplets(
    gram: FormedGram, w: Tensor, norm: Tensor, rank: Rank, lowered: Lowered | None
) -> Triplets | None:
    """Computes `gram_triplets` of one matrix from its leading eigenvectors alone.

    None where that does not pay: where many of the columns are asked for, on a GPU,
    without the extension, and where eigenvalues lie too close.
    """
    d = w.shape[-2]
    most = int(TUNING.partial_share * d)
    if not solves_partially(w) or (isinstance(rank, int) and rank > most):
        return None
    reduced = Reduced.of(gram.single if lowered is None else lowered.single)
    energy = gram.precise.diagonal(dim1=-2, dim2=-1).sum(-1)
    wanted = most if isinstance(rank, float) else rank
    leading_values = reduced.values(min(d, int(wanted * TUNING.further) + 2 * TUNING.further_rows))
    leading = leading_values.clamp_min(0)
    top = leading[:, :1] if lowered is None else lowered.top
    if lowered is not None:
        leading[0, : len(lowered.head.theta)] = lowered.head.theta
    # The others share what is left of the trace, which is all that a share of energy asks of them.
    rest = ((energy - leading.sum(-1)) / max(1, d - leading.shape[1])).clamp_min(0)
    values = torch.cat([leading, rest[:, None].expand(1, d - leading.shape[1])], 1)
    cut, fits = _find_cut(values, rank, top)
    for _ in range(1 + TUNING.recounts):
        seen = min(d, cut.near + max(TUNING.further_rows, cut.near // 4))
        if cut.most > most or seen > leading.shape[1]:
            return None
        rows = reduced.rows(leading_values[:, :seen])
        if rows is None:
            return None
        if lowered is not None:
            lowered.restore(leading, rows)
        beyond = ((energy - leading[:, :seen].sum(-1)) / max(1, d - seen)).clamp_min(0)
        near, far = rows[:, : cut.near], rows[:, cut.near :]
        head = None if lowered is None else lowered.head.rows[None]
        # As far as rounding goes: the first value that lies in neither is known.
        ritz = Ritz(near, far, leading[:, :seen], beyond, torch.zeros_like(norm), head, True)
        refined = refine_triplets(gram, w, norm, ritz, cut, "gram-f32")
        if not isinstance(rank, float):
            return mark_failed(refined, fits)
        missing = _count_missing(refined.s.square().sum(-1), refined.s, rank * energy, cut)
        if not missing.any() or not 1 <= cut.most + int(missing) < d:
            break
        cut = make_even_cut(w, cut.most + int(missing), cut.guard)
    return mark_failed(refined, fits & (missing == 0))


def _lower_head(gram: FormedGram, w: Tensor, norm: Tensor) -> Lowered | None:
    """Lowers the head of one steep spectrum, solved in float64, on a CPU; None elsewhere."""
    d = w.shape[-2]
    if not is_on_host(w) or len(w) != 1 or not bool(norm[0] > 0):
        return None
    head = find_head(gram, float(norm[0].square()), d, TUNING.gram_head / d**2)
    if head is None:
        return None
    top = 2 * head.theta[-1]
    lowered = torch.addmm(gram.precise[0], (head.rows * (top - head.theta)[:, None]).mT, head.rows)
    return Lowered(lowered.float()[None], head, top.reshape(1, 1))


def _solve_in_single(
    gram: FormedGram, lowered: Lowered | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns eigenvalues [b, d], eigenvectors as rows, what rounding is relative to, the head."""
    if lowered is None:
        values, vectors = descending_eigh(gram.single)
        return values.double(), vectors.mT, values[:, :1].double(), None
    values, vectors = descending_eigh(lowered.single)
    values, rows = values.double(), vectors.mT.contiguous()
    lowered.restore(values, rows)
    return values, rows, lowered.top, lowered.head.rows[None]


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
