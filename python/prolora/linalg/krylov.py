"""Leading singular triplets by block Krylov iteration: a few columns of a large matrix.

A basis of span{Y, GY, G²Y, …} with G = wwᵀ and Y a random block much narrower than k is grown until
the Ritz vectors have converged (Musco & Musco 2015; a small block beats a wide one at equal cost:
Chen, Epperly, Meyer, Musco, Rao 2025). Products run in float32; the last step, a Rayleigh-Ritz
projection on the Ritz vectors and their image under G, in float64, so that what is returned and
what is said of it do not carry the rounding of the iteration.

Randomised SVD with a fixed number of power iterations is the special case that never checks: on the
spectra of diffusion weights its largest angle to the true subspace is 90°.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .triplets import Triplets, rounding_error

# Krylov pays where few columns of a large matrix are wanted: k ≤ d/8.
MIN_DIMENSION = 768
SHARE = 8
# A basis beyond this share of the space costs more than factorising it.
LARGEST_BASIS = 0.6


def suits(d: int, k: int) -> bool:
    """Whether k columns of a d-dimensional space are few enough."""
    return d >= MIN_DIMENSION and k * SHARE <= d


def krylov_triplets(w: Tensor, k: int, tol: float, seed: int) -> Triplets | None:
    """The k leading triplets of w [b, d, n] (float64, d ≤ n), or None where the iteration gives up.

    Args:
        w: the stack; all matrices share the depth that the hardest needs.
        k: columns.
        tol: the sine of the largest principal angle to reach.
        seed: of the starting block; the same for every matrix, so that a stack equals its members.
    """
    b, d, _ = w.shape
    block = max(8, min(64, k // 4))
    guard = max(8, k // 8)
    single = w.float()
    start = torch.randn(d, block, generator=torch.Generator().manual_seed(seed))
    basis = _grow(single, start.to(w.device).expand(b, -1, -1), k, guard, tol)
    return None if basis is None else _polish(w, basis, k)


def _grow(w: Tensor, start: Tensor, k: int, guard: int, tol: float) -> Tensor | None:
    """Ritz vectors [b, d, k + guard] of wwᵀ once the first k have converged, in float32."""
    b, d, _ = w.shape
    width = start.shape[-1]
    limit = int(LARGEST_BASIS * d)
    q = _orthonormal(start)
    if q is None:
        return None
    basis = w.new_empty(b, d, limit)
    projected = torch.zeros(b, limit, limit, dtype=torch.float64, device=w.device)
    basis[..., :width] = q
    size, due, before = width, min(limit - width, max(k + guard, 3 * k)), None
    while True:
        known = basis[..., :size]
        image = w @ (w.mT @ q)
        # Classical Gram-Schmidt, twice: its coefficients are the new column of QᵀGQ.
        first = known.mT @ image
        image = image - known @ first
        second = known.mT @ image
        image = image - known @ second
        column = (first + second).double()
        projected[:, :size, size - width : size] = column
        projected[:, size - width : size, :size] = column.mT
        if size >= due:
            sine, vectors = _convergence(projected[:, :size, :size], image, k)
            if sine <= tol:
                return known @ vectors[..., : k + guard].float()
            due = _next_check(size, sine, before, tol, 2 * width)
            before = size, sine
        if size + width > limit:
            return None
        q = _orthonormal(image)
        if q is None:
            return None
        basis[..., size : size + width] = q
        size += width


def _convergence(projected: Tensor, image: Tensor, k: int) -> tuple[float, Tensor]:
    """The largest estimate of the sine of the angle over the stack, and the Ritz vectors.

    Args:
        projected: QᵀGQ [b, D, D], float64.
        image: [b, d, c], what G maps the last block to outside the basis.
        k: columns that must have converged.
    """
    values, vectors = torch.linalg.eigh(projected)
    values, vectors = values.flip(-1), vectors.flip(-1)
    # The residual of a Ritz pair is the coupling to what the basis lacks, times the last rows of
    # its vector; its distance from the true subspace is at most residual over gap.
    coupling = torch.linalg.matrix_norm(image.double())
    tails = torch.linalg.vector_norm(vectors[:, -image.shape[-1] :, :k], dim=1)
    gaps = (values[:, :k] - values[:, k : k + 1]).clamp_min(1e-300)
    sines = torch.linalg.vector_norm(coupling[:, None] * tails / gaps, dim=-1)
    return float(sines.max()), vectors


def _next_check(
    size: int, sine: float, before: tuple[int, float] | None, tol: float, step: int
) -> int:
    """The size of the basis at which to look again.

    A look costs an eigenproblem of the basis, so it is not taken after every block: the logarithm
    of the angle falls about linearly with the size.
    """
    if before is None or not 0 < sine < before[1]:
        return size + step
    slope = math.log(before[1] / sine) / (size - before[0])
    return size + min(max(step // 2, int(math.log(sine / tol) / slope)), 4 * step)


def _orthonormal(panel: Tensor) -> Tensor | None:
    """CholQR2 of a panel [b, d, c] with the small Gram matrix in float64; None if it lacks rank."""
    for _ in range(2):
        wide = panel.double()
        factor, failed = torch.linalg.cholesky_ex(wide.mT @ wide)
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        if bool(failed.any()) or bool((diagonal.amin(-1) <= 1e-6 * diagonal.amax(-1)).any()):
            return None
        panel = torch.linalg.solve_triangular(factor, wide.mT, upper=False).mT.float()
    return panel


def _polish(w: Tensor, ritz: Tensor, k: int) -> Triplets:
    """Rayleigh-Ritz in float64 on the Ritz vectors and their image: the iteration's rounding goes.

    Args:
        w: [b, d, n], float64.
        ritz: [b, d, p], p > k, float32.
        k: columns to return.
    """
    inner = ritz.double()
    # [b, d, 2p]; one more step of the iteration, and free of its rounding.
    space = torch.linalg.qr(torch.cat([inner, w @ (w.mT @ inner)], -1))[0]
    image = w.mT @ space  # [b, n, 2p]
    values, vectors = torch.linalg.eigh(image.mT @ image)
    s = values.flip(-1).clamp_min(0).sqrt()
    vectors = vectors.flip(-1)[..., : k + 1]
    short, long = space @ vectors, image @ vectors / s[:, None, : k + 1].clamp_min(1e-300)
    beyond = torch.linalg.vector_norm(
        (w @ long[..., k:]).squeeze(-1) - short[..., k] * s[:, k : k + 1], dim=-1
    )
    following = s[:, k]
    return Triplets(
        short=short[..., :k].contiguous(),
        long=long[..., :k].contiguous(),
        s=s[:, :k],
        count=torch.full((len(w),), k, device=w.device),
        following=following,
        # The value that follows is within its own residual of this one, if the iteration missed
        # none: a random start misses a direction with probability zero.
        ceiling=following + beyond + rounding_error(w),
        left=torch.zeros_like(s[:, :k]),
        rungs=["krylov"] * len(w),
    )
