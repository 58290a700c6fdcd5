"""Leading singular triplets by block Krylov iteration: a few columns of a large matrix.

A basis of span{Y, GY, G²Y, …} with G = wwᵀ and Y a random block much narrower than k is grown until
the Ritz vectors have converged (Musco & Musco 2015; a small block beats a wide one at equal cost:
Chen, Epperly, Meyer, Musco, Rao 2025). Everything runs in float32. `refine_triplets` then takes the
rounding out and bounds the error; the basis grows on where the bound is not good enough.

Randomised SVD with a fixed number of power iterations is the special case that never checks: on the
spectra of diffusion weights its largest angle to the true subspace is 90°.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .products import FormedGram, ImpliedGram, lower_gram, mirror_lower, multiply_narrow
from .refinement import Refined, Ritz, refine_triplets
from .solvers import SKEW_32, attempt, eigh_stack, estimate_skew

# Krylov pays where few columns of a large matrix are wanted: k ≤ d/8.
MIN_DIMENSION = 768
SHARE = 8
# A basis beyond this share of the space costs more than factorising it.
LARGEST_BASIS = 0.6
# A basis of about this many times k is needed; from the first on it pays to look.
USUAL_BASIS = 4
FIRST_LOOK = 3.25
# By so much the logarithm of the angle falls as the basis grows by k.
USUAL_SLOPE = 6.0
# A product with a narrow block takes this much longer a flop than one with a whole matrix.
NARROW = 1.3
# The refinement improves on the estimate of the iteration about this much.
GAIN = 4
# A block of width b finds at most b vectors of an eigenspace: as many values this close to each
# other may hide more of them.
CLUSTER = 1e-2
# Columns of a panel that the others explain up to this are dropped.
DEPENDENT = 1e-6


def suits_krylov(d: int, k: int) -> bool:
    """Whether k columns of a d-dimensional space are few enough."""
    return d >= MIN_DIMENSION and k * SHARE <= d


def krylov_triplets(w: Tensor, norm: Tensor, k: int, tol: float, seed: int) -> list[Refined | None]:
    """The leading triplets of w [b, d, n] (float32, d ≤ n), None where the iteration gives up.

    Args:
        w: the stack; all matrices share the depth that the hardest needs.
        norm: [b], ‖w‖_F.
        k: columns.
        tol: the sine of the largest principal angle to reach.
        seed: of the starting block; the same for every matrix, so that a stack equals its members.
    """
    found: list[Refined | None] = [None] * len(w)
    _, d, n = w.shape
    single, grams = None, list[FormedGram | ImpliedGram]()
    if _gram_pays(d, n, USUAL_BASIS * k, k):
        precise = mirror_lower(lower_gram(w))
        single = precise.float()
        grams = [FormedGram(*pair) for pair in zip(precise, single, strict=True)]
    for iterates in _iterate_blocks(w, single, norm, k, tol, seed):
        grams = grams or [ImpliedGram(one.double(), one) for one in w]
        for i, ritz in enumerate(iterates):
            if found[i] is None or found[i].angle > tol:  # type: ignore[union-attr]
                found[i] = attempt(
                    partial(refine_triplets, grams[i], w[i], float(norm[i]), ritz, k)
                )
        if all(one is not None and one.angle <= tol for one in found):
            break
    return found


def _iterate_blocks(
    w: Tensor, gram: Tensor | None, norm: Tensor, k: int, tol: float, seed: int
) -> Iterator[list[Ritz]]:
    """Ritz vectors of wwᵀ each time that the first k seem to have converged.

    Args:
        w: [b, d, n].
        gram: wwᵀ [b, d, d], where it was formed.
        norm: [b], ‖w‖_F.
        k: columns.
        tol: the sine to reach.
        seed: of the starting block.
    """
    b, d, _ = w.shape
    width = max(8, min(32, k // 4))
    guard = _count_guard(k)
    limit = int(LARGEST_BASIS * d)
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(d, width, generator=generator, dtype=torch.float32, device="cpu")
    random = start.to(w.device).expand(b, -1, -1)
    basis = w.new_empty(b, d, limit)
    projected = w.new_zeros(b, limit, limit)
    q = _orthonormal_panel(random, basis[..., :0], norm.new_ones(b), random)
    basis[..., :width] = q
    size, due, before = width, min(limit - width, max(k + 2 * guard, int(FIRST_LOOK * k))), None
    while True:
        known = basis[..., :size]
        image = multiply_narrow(w, multiply_narrow(w.mT, q)) if gram is None else gram @ q
        image, column = _orthogonalise(image, known)
        projected[:, :size, size - width : size] = column
        projected[:, size - width : size, :size] = column.mT
        if size >= due:
            pairs = _solve_projected(projected[:, :size, :size])
            if pairs is None or _is_clustered(pairs[0][:, : k + 1], width):
                return
            values, vectors = pairs
            coupling = torch.linalg.matrix_norm(image.double())
            tails = torch.linalg.vector_norm(vectors[:, -width:], dim=1)
            left = coupling[:, None] * tails  # [b, D], the residuals of the Ritz pairs
            sine = _estimate_sine(values, left, k)
            if sine <= GAIN * tol:
                yield _select_ritz(known, values, vectors, left, norm, k)
            due = _next_check(size, sine, before, GAIN * tol, k, width)
            before = size, sine
        if size + width > limit:
            return
        scale = torch.linalg.matrix_norm(column).double()
        q = _orthonormal_panel(image, known, scale, random)
        basis[..., size : size + width] = q
        size += width


def _count_guard(k: int) -> int:
    """How many Ritz vectors behind the k wanted ones the refinement looks at."""
    return max(16, min(32, k // 8))


def _orthogonalise(image: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """A block [b, d, c] without its part in the span of `known` [b, d, D], and QᵀGQ's new column.

    Classical Gram-Schmidt, twice: its coefficients [b, D, c] are that column.
    """
    first = known.mT @ image
    image = image - known @ first
    second = known.mT @ image
    return image - known @ second, first + second


def _solve_projected(projected: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues (float64, not negative) and eigenvectors of QᵀGQ [b, D, D], descending.

    None where the solver gave no orthonormal vectors.
    """
    values, vectors = eigh_stack(projected)
    if not bool(values.isfinite().all() & (estimate_skew(vectors) <= SKEW_32).all()):
        return None
    return values.flip(-1).double().clamp_min(0), vectors.flip(-1)


def _select_ritz(
    known: Tensor, values: Tensor, vectors: Tensor, left: Tensor, norm: Tensor, k: int
) -> list[Ritz]:
    """The leading Ritz vectors of every matrix, as many as the refinement looks at.

    Args:
        known: the basis [b, d, D].
        values: [b, D].
        vectors: [b, D, D], in that basis.
        left: [b, D], the residuals.
        norm: [b], ‖w‖_F.
        k: columns wanted.
    """
    d, size = known.shape[-2:]
    p = k + _count_guard(k)
    seen = min(size, 2 * p)
    ritz = known @ vectors[..., :seen]
    values = values[:, :seen]
    beyond = (norm.square() - values.sum(-1)).clamp_min(0) / (d - seen)
    return [
        Ritz(near, far, values[i], float(beyond[i]), float(left[i, p]), False)
        for i, (near, far) in enumerate(zip(ritz[..., :p], ritz[..., p:], strict=True))
    ]


def _gram_pays(d: int, n: int, size: int, k: int) -> bool:
    """Whether to form wwᵀ, for a basis of `size` columns, rather than pass through w twice.

    Flops in float32, those in float64 counted twice: the Gram matrix and its products with the
    basis, against those with w for the basis and for the residuals of k columns.
    """
    with_gram = 2.5 * d * d * n + NARROW * 2.0 * d * d * size
    without = NARROW * 4.0 * d * n * size + 8.0 * d * n * k
    return with_gram < without


def _is_clustered(values: Tensor, width: int) -> bool:
    """Whether `width` of the values [b, p], descending, lie close enough to hide more of them."""
    first, last = values[:, : 1 - width or None], values[:, width - 1 :]
    return bool((first - last <= CLUSTER * first).any())


def _estimate_sine(values: Tensor, left: Tensor, k: int) -> float:
    """An estimate of the sine of the angle to the true subspace: residual over gap.

    The largest over the stack.

    Args:
        values: [b, D].
        left: [b, D], the residuals: what couples a Ritz vector to what the basis lacks.
        k: columns that must have converged.
    """
    gaps = (values[:, :k] - values[:, k : k + 1]).clamp_min(1e-300)
    return float(torch.linalg.vector_norm(left[:, :k].double() / gaps, dim=-1).max())


def _next_check(
    size: int, sine: float, before: tuple[int, float] | None, tol: float, k: int, step: int
) -> int:
    """The size of the basis at which to look again.

    A look costs an eigenproblem of the basis, so it is not taken after every block: the logarithm
    of the angle falls about linearly with the size.
    """
    slope = USUAL_SLOPE / k
    if before is not None and sine < before[1]:
        slope = math.log(before[1] / sine) / (size - before[0])
    return size + min(max(step, int(math.log(max(1.0, sine / tol)) / slope)), 4 * step)


def _orthonormal_panel(panel: Tensor, known: Tensor, scale: Tensor, random: Tensor) -> Tensor:
    """Orthonormal columns for a panel [b, d, c] that is orthogonal to `known` already: CholQR2.

    The Gram matrix of the first pass is in float64, so that a condition of 1e6 is no trouble. What
    is shorter than that, of `scale` [b], is rounding: see `_complete_panel`.
    """
    q = panel
    for precise in (True, False):
        wide = q.double() if precise else q
        factor, failed = torch.linalg.cholesky_ex((wide.mT @ wide).double())
        least = factor.diagonal(dim1=-2, dim2=-1).amin(-1)
        if bool(failed.any()) or not bool((least > DEPENDENT * scale).all()):
            return _complete_panel(panel, known, scale, random)
        eye = torch.eye(q.shape[-1], dtype=factor.dtype, device=q.device).expand_as(factor)
        q = q @ torch.linalg.solve_triangular(factor, eye, upper=False).mT.float()
        scale = torch.ones_like(scale)
    return q


def _complete_panel(panel: Tensor, known: Tensor, scale: Tensor, random: Tensor) -> Tensor:
    """`_orthonormal_panel` for lower rank: columns that the others explain give way to random ones.

    The iteration has exhausted the space that its start reaches in these columns; a weight of low
    rank has no more, and another one gets the chance to show what the start has missed.
    """
    lengths = torch.linalg.qr(panel.double())[1].diagonal(dim1=-2, dim2=-1).abs()
    dropped = ~(lengths > DEPENDENT * scale[:, None])
    q = torch.where(dropped[:, None], random, panel / scale.float()[:, None, None])
    for _ in range(2):
        q = torch.linalg.qr((q - known @ (known.mT @ q)).double())[0].float()
    return q
