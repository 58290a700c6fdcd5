"""Updates of high rank as a LoRA: exact, or a truncated SVD.

The rule, in one place: an update of numerical rank `MAX_RANK` or less is kept exactly, whatever the
number of columns it comes with; a dense one, but for what rounding to its stored dtype added. A
larger one keeps the fewest singular values that hold `ENERGY` of
Σσ², and at most `MAX_RANK` of them. The share that is kept is handed out with the update and never
assumed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.basis import truncated_svd
from ...core.lowrank import LowRank
from ...core.rank_rule import columns_holding
from ...core.recompression import balance_factors, product_svd
from ...core.svd.solvers import descending_eigh

MAX_RANK = 256
ENERGY = 0.999

# Singular values below this share of the largest are rounding errors of float32 factors.
_ROUNDING = 1e-9
# ‖rest‖/‖ΔW‖ that rounding to float32 adds beside a matrix's rank.
_NEGLIGIBLE = 1e-6
# σ_k/σ_1 above which squares, in which σ_1² is rounded by 1e-16, are right to single precision.
_SQUARED = 1e-5


class TruncatedUpdate(NamedTuple):
    """An update as a product, and the share that it keeps."""

    update: LowRank  # up [m, r], down [r, n]
    kept: float = 1.0  # ‖update‖²/‖ΔW‖²; 1 where nothing was cut
    # Of ‖ΔW‖², by column that the rule would keep, as far as that is known; None for all columns
    shares: Tensor | None = None


def truncate_dense(
    delta: Tensor, rank: int = MAX_RANK, stored: torch.dtype = torch.float64
) -> TruncatedUpdate:
    """Factors ΔW [m, n], which was rounded to `stored`, into a product of balanced factors."""
    # The most that rounding adds, as a share of the matrix's norm (root mean square).
    noise = torch.finfo(stored).eps / 12**0.5
    delta = delta.double()
    size = delta.square().sum().item()
    if min(delta.shape) <= MAX_RANK:
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        used = _count_all_columns(s, noise)
        exact = s[used:].square().sum().item() <= _NEGLIGIBLE**2 * size
        return _cut_columns(u, s[:used], vt.mT, size, rank, exact=exact)
    # Single precision is as fine as the result is stored, and far finer than what is cut.
    basis = truncated_svd(delta.float(), min(rank, MAX_RANK))
    s = basis.S.double()
    share = s.square().sum().item() / size if size else 1.0
    if share > 1 - 1e-5 and (whole := _factor_exactly(delta, basis.U, noise)) is not None:
        return TruncatedUpdate(whole)
    kept = _count_columns(s, size) if rank >= MAX_RANK else len(s)
    return _cut_columns(basis.U.double(), s[:kept], basis.V.double(), size, rank)


def _cut_columns(
    u: Tensor, s: Tensor, v: Tensor, size: float, rank: int, *, exact: bool = False
) -> TruncatedUpdate:
    """Makes a product of leading columns of U, S and V.

    S has what the rule keeps of Σσ² = `size`; it is all of that where it is `exact`.
    """
    r = min(rank, len(s))
    update = LowRank(*balance_factors(u[:, :r], s[:r], v[:, :r]))
    if not size or (exact and r == len(s)):
        return TruncatedUpdate(update)
    shares = s.square() / size
    return TruncatedUpdate(update, min(1.0, shares[:r].sum().item()), shares)


def _factor_exactly(delta: Tensor, u: Tensor, noise: float) -> LowRank | None:
    """Factors float64 ΔW [m, n] in span(u); None if more than rounding is left.

    u [m, k] lies near the leading left singular vectors.
    """
    frame = torch.linalg.qr(u.double()).Q
    core = frame.mT @ delta
    rest = (delta - frame @ core).norm()
    if rest > _NEGLIGIBLE * delta.norm():
        return None
    left, s, vt = torch.linalg.svd(core, full_matrices=False)
    used = _count_all_columns(s, noise)
    return LowRank(*balance_factors(frame @ left[:, :used], s[:used], vt[:used].mT))


def truncate_product(update: LowRank, rank: int = MAX_RANK) -> TruncatedUpdate:
    """Cuts a product to the rule of this file, and to a rank."""
    if update.rank <= min(rank, MAX_RANK):
        return TruncatedUpdate(update)
    if update.rank >= min(update.shape):
        return truncate_dense(update.up.double() @ update.down.double(), rank)
    up, down = update.up.double(), update.down.double()
    u, s, v = _leading_columns(up, down, rank) or product_svd(up, down)
    size, exact = s.square().sum().item(), _count_all_columns(s)
    kept = _count_columns(s, size) if exact > MAX_RANK else exact
    return _cut_columns(u, s[:kept], v, size, rank, exact=exact <= MAX_RANK)


def _leading_columns(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Computes S and the leading columns of up @ down by Gram matrices.

    It is a third of the work of `product_svd`; None where squaring loses what is wanted.
    """
    if rank >= MAX_RANK:
        return None
    values, vectors = descending_eigh((up.mT @ up)[None])
    root = vectors[0] * values[0].clamp_min(0).sqrt()
    energies, turned = descending_eigh((root.mT @ (down @ down.mT) @ root)[None])
    s = energies[0].clamp_min(0).sqrt()
    if not s[rank - 1] > _SQUARED * s[0]:  # true for NaN
        return None
    v = down.mT @ (root @ turned[0, :, :rank]) / s[:rank]
    return up @ (down @ v) / s[:rank], s, v


def truncate_kronecker(w1: Tensor, w2: Tensor, rank: int = MAX_RANK) -> TruncatedUpdate:
    """Returns kron(w1, w2) of [a, b] and [c, d] as a product.

    It comes from the SVDs of the two: the singular values are all products σᵢ(w1)·σⱼ(w2), so the
    largest are found without forming the [ac, bd] matrix.
    """
    (u1, s1, v1), (u2, s2, v2) = (_thin_svd(w, rank) for w in (w1, w2))
    products = torch.outer(s1, s2).flatten()
    s, order = products.sort(descending=True, stable=True)
    size = (w1.double().norm() * w2.double().norm()).item() ** 2
    exact, kept = MAX_RANK + 1, min(rank, len(s))
    if len(s) == min(w1.shape) * min(w2.shape):  # all of them
        used = max(1, int((s > _ROUNDING * s[0]).sum()))
        exact = used if used <= MAX_RANK else _count_all_columns(s)
        kept = exact if exact <= MAX_RANK else _count_columns(s, size)
    wanted = order[: min(kept, rank)]
    i, j = wanted // len(s2), wanted % len(s2)
    # Column (i, j) of kron(u1, u2) is kron(u1[:, i], u2[:, j]).
    u, v = (
        torch.einsum("ak,ck->ack", left[:, i], right[:, j]).flatten(0, 1)
        for left, right in ((u1, u2), (v1, v2))
    )
    return _cut_columns(u, s[:kept], v, size, rank, exact=exact <= MAX_RANK)


def _thin_svd(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U, S and V of a matrix; of a large one the leading columns, where few are wanted."""
    if rank < MAX_RANK < min(w.shape):
        basis = truncated_svd(w.float(), rank)
        return basis.U.double(), basis.S.double(), basis.V.double()
    w = w.double()
    wide = w if w.shape[0] <= w.shape[1] else w.mT
    if rank < min(len(wide), MAX_RANK):
        energies, vectors = descending_eigh((wide @ wide.mT)[None])
        s, u = energies[0].clamp_min(0).sqrt(), vectors[0, :, :rank]
        if s[rank - 1] > _SQUARED * s[0]:  # false for NaN
            v = wide.mT @ u / s[:rank]
            return (u, s, v) if wide is w else (v, s, u)
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    return u, s, vt.mT


def _count_all_columns(s: Tensor, negligible: float = _NEGLIGIBLE) -> int:
    """Counts the leading singular values that leave no more than rounding."""
    rest = s.square().flip(0).cumsum(0).sqrt().flip(0)
    return max(1, int(((rest > negligible * rest[0]) & (s > _ROUNDING * s[0])).sum()))


def _count_columns(s: Tensor, size: float) -> int:
    """Counts the leading singular values that the rule keeps of Σσ² = `size`."""
    if s.square().sum().item() < ENERGY * size:
        return min(MAX_RANK, len(s))
    share = ENERGY * size / s.square().sum().item() if size else 1.0
    return min(MAX_RANK, int(columns_holding(s, share)))
