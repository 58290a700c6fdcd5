"""Leading singular triplets by dense factorisation in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..exceptions import SolverFailure
from ..precision import EPS
from ..rank_rule import Rank, count_columns
from ..symmetric import lower_gram
from .products import multiply_narrow
from .solvers import SKEW_64, estimate_skew, full_svd, measured_eigh
from .triplets import Evidence, Triplets, residual_and_angle, rounding_error

# Below this σ_k/σ_1 the eigenvalues of the Gram matrix lose σ_k to rounding (√(d·eps) ≈ 1e-6).
GRAM_RANGE = 1e-5


@dataclass(frozen=True)
class Spectrum:
    """A solver's singular values and left vectors of w [b, d, n]."""

    short: Tensor  # [b, d, d], by descending value
    s: Tensor  # [b, d]
    skew: Tensor  # [b], ‖UᵀU − I‖_F; NaN where the solver failed
    # [b], by how much Σσ² differs from ‖w‖²: what a vector that the solver missed may hold more
    # than the one that it gave instead.
    missing: Tensor
    right: dict[int, Tensor]  # the right vectors [n, d] of those matrices that went through an SVD


def dense_triplets(w: Tensor, norm: Tensor, rank: Rank) -> Triplets:
    """Eigenvectors of wwᵀ where they resolve the spectrum down to σ_k, LAPACK's SVD elsewhere.

    w: [b, d, n], d ≤ n; norm: [b], ‖w‖_F; rank: the columns to return, as a rule.

    Raises:
        SolverFailure: neither gave a result for one of the matrices.
    """
    spectrum = _gram_spectrum(w)
    count = _count_columns(spectrum.s, rank, w.shape[-2:])
    # One wait of the host, and another one where a matrix needs an SVD.
    counts, unresolved = _read_counts(count, _is_unresolved(spectrum, count))
    if unresolved:
        _replace_by_svd(spectrum, w, unresolved)
        count = _count_columns(spectrum.s, rank, w.shape[-2:])
        counts, _ = _read_counts(count, spectrum.skew > 0)
    right = spectrum.right
    k = max(1, *counts) if counts else 1
    used = torch.arange(k, device=w.device) < count[:, None]
    short, kept = spectrum.short[..., :k], spectrum.s[:, :k]
    if any(own < k for own in counts):
        short, kept = short * used[:, None], kept * used
    long = multiply_narrow(w.mT, short) / torch.where(kept > 0, kept, 1.0)[:, None]
    left = torch.zeros_like(kept)
    for i, vectors in right.items():
        long[i] = vectors[:, :k] * used[i]
        left[i] = torch.linalg.vector_norm(w[i].mT @ short[i] - long[i] * kept[i], dim=0)
    last = torch.cat([spectrum.s, spectrum.s.new_zeros(len(w), 1)], -1)
    following = last.gather(-1, count[:, None]).squeeze(-1)
    evidence = Evidence(
        ceiling=_ceiling(spectrum, following, count, rounding_error(w, norm), norm),
        left=left,
        skew=torch.maximum(spectrum.skew, estimate_skew(long, used)),
        error=rounding_error(w, norm),
    )
    residual, angle = residual_and_angle(w, (short, kept, long), count, evidence)
    solvers = tuple("svd-f64" if i in right else "gram-f64" for i in range(len(w)))
    return Triplets(short, long, kept, count, following, residual, angle, solvers)


def _gram_spectrum(w: Tensor) -> Spectrum:
    """Solves for the eigenvectors of wwᵀ."""
    gram = lower_gram(w)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    values, short, skew = measured_eigh(gram)
    skew = torch.where(values.isfinite().all(-1), skew, torch.nan)
    missing = (trace - values.sum(-1)).abs()
    s = values.nan_to_num(0.0).clamp_min(0).sqrt()
    return Spectrum(short, s, skew, missing, {})


def _is_unresolved(spectrum: Spectrum, count: Tensor) -> Tensor:
    """Returns whether the Gram matrix says too little, or its vectors are skew: bool [b]."""
    s = spectrum.s
    last = s.gather(-1, (count - 1).clamp_min(0)[:, None]).squeeze(-1)
    return (last < GRAM_RANGE * s[:, 0]) & (s[:, 0] > 0) | ~(spectrum.skew <= SKEW_64)


def _read_counts(count: Tensor, flagged: Tensor) -> tuple[list[int], list[int]]:
    """Reads the counts and the indices of the flags, as the host waits."""
    counts, flags = torch.stack([count, flagged.to(count.dtype)]).tolist()
    return counts, [i for i, flag in enumerate(flags) if flag]


def _replace_by_svd(spectrum: Spectrum, w: Tensor, places: list[int]) -> None:
    """Puts LAPACK's SVD for the Gram matrix's eigenvectors, where it has one."""
    for i in places:
        svd = full_svd(w[i])
        if svd is None and not spectrum.skew[i] <= SKEW_64:
            raise SolverFailure(
                "neither the eigenvectors of a weight's Gram matrix nor its SVD could be computed: "
                "the solvers of this installation of torch failed on finite numbers"
            )
        if svd is not None:
            spectrum.short[i], spectrum.s[i], spectrum.right[i] = svd
            left, right = estimate_skew(svd[0]), estimate_skew(svd[2])
            spectrum.skew[i] = torch.maximum(left, right)
            energy = torch.linalg.matrix_norm(w[i]).square()
            spectrum.missing[i] = (energy - svd[1].square().sum()).abs()


def _ceiling(
    spectrum: Spectrum, following: Tensor, count: Tensor, error: Tensor, norm: Tensor
) -> Tensor:
    """Bounds σ_{k+1} from above: [b].

    The eigenvalues of the Gram matrix err relative to ‖w‖², so their roots by a root. A solver that
    gives one vector twice has missed another: it may hold what the sum of squares lacks.
    """
    ceiling = (following.square() + error * norm).sqrt()
    for i in spectrum.right:
        ceiling[i] = following[i] + error[i]
    lost = (ceiling.square() + spectrum.missing).sqrt()
    ceiling = torch.where(spectrum.missing > error * norm, lost, ceiling)
    return torch.where(count >= spectrum.s.shape[-1], torch.zeros_like(ceiling), ceiling)


def _count_columns(s: Tensor, rank: Rank, shape: torch.Size) -> Tensor:
    """Counts the columns that the rule asks for, at most the numerical rank: int64 [b]."""
    numerical = (s > max(shape) * EPS * s[:, :1]).sum(-1)
    return torch.minimum(count_columns(s, rank), numerical)
