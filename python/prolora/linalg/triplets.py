"""Leading singular triplets by dense factorisation: exact, and the lower rungs of the ladder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .recompression import columns_holding

Rank = int | float
"""An int is that many columns; a float in (0, 1) the smallest number holding that share of Σσ²."""

EPS = torch.finfo(torch.float64).eps
# Below this σ_k/σ_1 the eigenvalues of the Gram matrix lose σ_k to rounding (√(d·eps) ≈ 1e-6).
GRAM_RANGE = 1e-5


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of w [b, d, n], d ≤ n, in float64.

    Attributes:
        short: [b, d, k] singular vectors of the short side, zero columns beyond `count`.
        long: [b, n, k] of the long side, likewise.
        s: [b, k], descending, zero beyond `count`.
        count: int64 [b], columns in use.
        following: [b], the estimate of the first singular value left out, 0 if there is none.
        ceiling: [b], an upper bound on it: what rounding and non-convergence may hide is added.
        left: [b, k], ‖wᵀ·short_i − s_i·long_i‖ where it is not zero by construction.
        rungs: the algorithm of each matrix.
    """

    short: Tensor
    long: Tensor
    s: Tensor
    count: Tensor
    following: Tensor
    ceiling: Tensor
    left: Tensor
    rungs: list[str]

    def replaced(self, which: Tensor, others: Triplets) -> Triplets:
        """The stack with the matrices `which` (indices) taken from `others`, of at most its k."""
        missing = self.s.shape[-1] - others.s.shape[-1]
        fields = {}
        for name in ("short", "long", "s", "left", "count", "following", "ceiling"):
            theirs = getattr(others, name)
            if theirs.ndim > 1:
                theirs = torch.nn.functional.pad(theirs, (0, missing))
            fields[name] = getattr(self, name).index_copy(0, which, theirs)
        rungs = list(self.rungs)
        for i, rung in zip(which.tolist(), others.rungs, strict=True):
            rungs[i] = rung
        return Triplets(**fields, rungs=rungs)


def rounding_error(w: Tensor) -> Tensor:
    """[b], how far float64 products and LAPACK may move a singular value of w [b, d, n]."""
    norm: Tensor = torch.linalg.matrix_norm(w)
    return norm * (10 * (w.shape[-2] + w.shape[-1]) * EPS)


def dense_triplets(w: Tensor, rank: Rank) -> Triplets:
    """Eigenvectors of wwᵀ where they resolve the spectrum down to σ_k, LAPACK's SVD elsewhere."""
    eigenvalues, vectors = torch.linalg.eigh(w @ w.mT)
    short, s = vectors.flip(-1), eigenvalues.flip(-1).clamp_min(0).sqrt()  # [b, d, d], [b, d]
    count = _columns(s, rank, w.shape[-2:])
    last = s.gather(-1, (count - 1).clamp_min(0)[:, None]).squeeze(-1)
    fallen = (last < GRAM_RANGE * s[:, 0]) & (s[:, 0] > 0)
    right: dict[int, Tensor] = {}
    for i in fallen.nonzero().flatten().tolist():
        short[i], s[i], vt = torch.linalg.svd(w[i], full_matrices=False)
        right[i] = vt.mT
    count = _columns(s, rank, w.shape[-2:])
    k = max(1, int(count.max())) if len(w) else 1
    used = torch.arange(k, device=w.device) < count[:, None]
    short, kept = short[..., :k] * used[:, None], s[:, :k] * used
    long = w.mT @ short / torch.where(kept > 0, kept, 1.0)[:, None]
    left = torch.zeros_like(kept)
    for i, vectors in right.items():
        long[i] = vectors[:, :k] * used[i]
        left[i] = torch.linalg.vector_norm(w[i].mT @ short[i] - long[i] * kept[i], dim=0)
    following = torch.cat([s, s.new_zeros(len(w), 1)], -1).gather(-1, count[:, None]).squeeze(-1)
    # The eigenvalues of the Gram matrix err relative to ‖w‖², so their roots by a root.
    error = rounding_error(w)
    blurred = (following.square() + error * torch.linalg.matrix_norm(w)).sqrt()
    ceiling = torch.where(fallen, following + error, blurred)
    ceiling = torch.where(count >= w.shape[-2], torch.zeros_like(ceiling), ceiling)
    rungs = ["svd-f64" if i in right else "gram-f64" for i in range(len(w))]
    return Triplets(short, long, kept, count, following, ceiling, left, rungs)


def _columns(s: Tensor, rank: Rank, shape: torch.Size) -> Tensor:
    """How many columns the rule asks for, at most the numerical rank: int64 [b]."""
    numerical = (s > max(shape) * EPS * s[:, :1]).sum(-1)
    if isinstance(rank, float):
        wanted = columns_holding(s, rank)
    else:
        wanted = torch.full_like(numerical, rank)
    return torch.minimum(wanted, numerical)
