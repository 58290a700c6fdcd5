"""Principal angles between the subspaces of a stack.

On the CPU the matrices share out the threads, and LAPACK makes them orthonormal by reflections. A
stack on a GPU goes as one through products, Cholesky factors and batched solvers: the number of
calls does not depend on the number of matrices, and the host waits once, at the end, to learn which
matrices failed. Those few are done by reflections, one after the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ops.small_svd import MAX_SVD_COLUMNS, small_singular_values
from .parallel import map_on_threads
from .precision import EPS
from .svd.solvers import descending_eigh, eigenvalue_stack
from .svd.stacks import chunk_size, is_on_host
from .symmetric import lower_gram, mirror_lower

# Rows count as orthonormal if one more Cholesky step makes them so: its error is this, squared.
NEARLY_ORTHONORMAL = 1e-6
# After the shifted step, a row that the others reduce to less than this has no direction of its own
# but rounding: 3e-9 or so, where 1e-14 of its length would be 1e-7.
INDEPENDENT = 1e-7
# The Gram matrix of rows of length 1 tells shorter singular values from each other to 1e-12.
SHORT = 2.0**-13


def column_angles(x: Tensor, y: Tensor) -> Tensor:
    """Returns the principal angles between column spaces, ascending.

    x: [b, m, p], float64, full column rank; y: [b, m, q], q ≤ p. Returns radians [b, min(m, q)],
    float64.

    Raises:
        LinAlgError: the SVD of a matrix did not converge.
    """
    if x.requires_grad or y.requires_grad:
        return angles_by_reflections(x, y)
    if is_on_host(x):
        together = chunk_size(x.shape[1:], x.device)
        pairs = list(zip(x.split(together), y.split(together), strict=True))
        return torch.cat(map_on_threads(lambda pair: angles_by_reflections(*pair), pairs))
    if x.shape[2] > x.shape[1]:
        return angles_by_reflections(x, y)
    angles, trusted = angles_by_cholesky(x, y)
    rest = trusted.logical_not().nonzero().flatten().tolist()  # the one wait
    if rest:
        angles[rest] = angles_by_reflections(x[rest], y[rest])
    return angles


def angles_by_reflections(x: Tensor, y: Tensor) -> Tensor:
    """Computes `column_angles` by Householder reflections and LAPACK's or cuSOLVER's SVD."""
    x, y = torch.linalg.qr(x)[0], torch.linalg.qr(y)[0]
    inner = x.mT @ y
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(y - x @ inner)
    return join_angles(cosines, sines)


def angles_by_cholesky(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `column_angles` of a stack without reading numbers on the host, p ≤ m.

    Returns the angles [b, q], and bool [b], True for the matrices whose angles are right.
    """
    x, full_rank = orthonormal_rows(x.mT)
    y, too = orthonormal_rows(y.mT)
    inner = y @ x.mT  # [b, q, p]
    cosines = singular_values(inner)
    sines = singular_values(torch.baddbmm(y, inner, x, alpha=-1))
    angles = join_angles(cosines, sines)
    return angles, full_rank & too & angles.isfinite().all(1)


def join_angles(cosines: Tensor, sines: Tensor) -> Tensor:
    """Angles [b, q], ascending, from their cosines and sines, both descending.

    The cosine of a small angle does not tell it from zero, nor the sine of a large one it from 90°.
    """
    cosines, sines = cosines.clamp(0, 1), sines.flip(-1).clamp(0, 1)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def orthonormal_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns orthonormal rows with the span of `rows` [b, p, m], p ≤ m, float64.

    Shifted Cholesky QR (Fukaya et al. 2020, doi:10.1137/18M1218212): the shift lets the first
    factor exist at any condition number, and two more factors remove what it left.

    Returns the rows [b, p, m], and bool [b], True where they are orthonormal with the span of
    `rows`: not where rows depend on each other to 1e-13 or so.
    """
    exponents = torch.frexp(rows.abs().amax(2, keepdim=True))[1]
    rows = torch.ldexp(rows, -exponents)  # squares of what float64 holds may be beyond its range
    trusted = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for step in range(3):
        gram = lower_gram(rows)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        if step == 0:
            diagonal += 2 * EPS * diagonal.sum(1, keepdim=True)
        if step == 2:
            off = torch.linalg.vector_norm(gram.tril(-1), dim=(1, 2))
            trusted &= off + (diagonal - 1).abs().amax(1) < NEARLY_ORTHONORMAL
        lower, info = torch.linalg.cholesky_ex(gram)
        trusted &= info == 0
        if step == 1:
            trusted &= lower.diagonal(dim1=1, dim2=2).amin(1) > INDEPENDENT
        rows = torch.linalg.solve_triangular(lower, rows, upper=False)
    return rows, trusted


def singular_values(rows: Tensor) -> Tensor:
    """Returns the singular values [b, q] of a stack [b, q, m], descending.

    q ≤ m, and the matrices have norm 1 or less. Errors are 1e-12 or less, whatever the value: none
    is the root of an eigenvalue near 0. NaN for a matrix that a solver failed on.
    """
    q, m = rows.shape[1:]
    if q <= MAX_SVD_COLUMNS:
        return small_singular_values(lower_factor(rows) if m > q else rows)
    # Turned by eigenvectors of their Gram matrix, rows are as long as the singular values; those
    # too short for it to tell apart are solved once more, by themselves.
    turned = descending_eigh(lower_gram(rows))[1].mT @ rows
    lengths = torch.linalg.vector_norm(turned, dim=2)
    short = lengths < SHORT
    rest = turned.masked_fill(~short[..., None], 0)
    few = eigenvalue_stack(lower_gram(rest)).clamp_min(0).sqrt()
    long = lengths.masked_fill(short, 0).sort(dim=1, descending=True)[0]
    place = torch.arange(q, device=rows.device) - (~short).sum(1, keepdim=True)
    return torch.where(place < 0, long, few.gather(1, place.clamp_min(0)))


def lower_factor(rows: Tensor) -> Tensor:
    """Returns lower L [b, q, q] with the singular values of rows = L Q.

    `rows` [b, q, m] have norm 1 or less. Cholesky QR with a shift s in each of its steps, so that
    no step can fail: what depends on other rows leaves zeros in Q and no more than s² in L. A row
    that has become orthonormal gets the length √(1 + s) from the shift of the last step, and all
    are scaled by that.
    """
    shift = 2 * EPS * rows.shape[1]
    factors: list[Tensor] = []
    for _ in range(3):
        if factors:
            rows = torch.linalg.solve_triangular(factors[-1], rows, upper=False)
        gram = lower_gram(rows)
        gram.diagonal(dim1=1, dim2=2).add_(shift)
        factors.append(torch.linalg.cholesky_ex(gram)[0])
    first, second, third = factors
    return first @ (second @ third) / math.sqrt(1 + shift)


def orthonormal_angles(x: Tensor, y: Tensor) -> Tensor:
    """Returns the principal angles [min(p, q)] between orthonormal x and y, ascending.

    x is [m, p], y [m, q]. The sines are the singular values of the part of Y outside of X: of Y −
    X(XᵀY), or, where less than half of the space is outside, of its coordinates there, which are
    fewer. That part has float32's relative accuracy; only its Gram matrix and the eigenvalues need
    float64, because they square the sines.
    """
    if x.shape[-1] < y.shape[-1]:
        x, y = y, x
    m, p = x.shape
    q = y.shape[-1]
    if p == m:
        return y.new_zeros(q, dtype=torch.float64)
    if 2 * p > m:
        outside = torch.ormqr(*torch.geqrf(x), y, transpose=True)[p:]
    else:
        outside = torch.addmm(y, x, x.mT @ y, alpha=-1)
    tall = outside.shape[0] > q
    squares = torch.linalg.eigvalsh(lower_gram(outside.mT if tall else outside))
    return torch.nn.functional.pad(squares.clamp(0, 1).sqrt().asin(), (q - len(squares), 0))


def stacked_angles(x: Tensor, y: Tensor, used_x: Tensor, used_y: Tensor) -> Tensor:
    """Computes `orthonormal_angles` of a stack without reading numbers on the host.

    x: [b, m, p], orthonormal columns, followed by columns of zeros; y: [b, m, q]; used_x: int64
    [b], the columns that are not zeros; used_y: as used_x. Returns radians [b, min(p, q)],
    ascending; the first min(used_x, used_y) of a matrix are valid. NaN where a solver failed.
    """
    if x.shape[2] < y.shape[2]:
        x, y, used_x, used_y = y, x, used_y, used_x
    m, q = y.shape[1:]
    outside = torch.baddbmm(y, x, x.mT @ y, alpha=-1)
    gram = lower_gram(outside.mT)
    places = torch.arange(q, device=y.device)
    # Padding gets a square above all others, so that it comes last.
    gram.diagonal(dim1=1, dim2=2).add_(2.0 * (places >= used_y[:, None]))
    if q <= MAX_SVD_COLUMNS:
        squares = small_singular_values(mirror_lower(gram)).flip(-1)
    else:
        squares = eigenvalue_stack(gram).flip(-1)
    # Two subspaces whose dimensions add up to more than m share the rest.
    shared = places < (used_x + used_y - m)[:, None]
    angles: Tensor = squares.masked_fill(shared, 0).clamp(0, 1).sqrt().asin()
    return angles
