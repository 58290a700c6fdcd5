"""Leading singular triplets by block Krylov iteration: a few columns of a large matrix.

A basis of span{Y, GY, G²Y, …} with G = wwᵀ and Y a random block much narrower than k is grown until
the Ritz vectors have converged (Musco & Musco 2015; a small block beats a wide one at equal cost:
Chen, Epperly, Meyer, Musco, Rao 2025). Everything runs in float32. `refine_triplets` then takes the
rounding out and bounds the error; the basis grows on where the bound is not good enough.

A stack goes through it as one. The host waits for a number only where it looks at convergence.

Randomised SVD with a fixed number of power iterations is the special case that never checks: on the
spectra of diffusion weights its largest angle to the true subspace is 90°.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor

from ..ops import native, trial
from ..ops.krylov_block import STORED
from ..precision import EPS32
from ..rank_rule import Rank
from .block_basis import BlockBasis
from .cut import make_even_cut
from .head import LeadingPairs, find_head
from .partial import leading_eigh
from .products import AnyGram, FormedGram, ImpliedGram
from .refinement import Ritz, refine_triplets
from .stacks import float64_cost, is_on_host, take_places
from .triplets import Triplets
from .tuning import TUNING

# Below this a sine is rounding alone.
TINY_SINE = 1e-30
# A block of width b finds at most b vectors of an eigenspace: as many values this close to each
# other may hide more of them.
CLUSTER = 1e-2
# How far the first blocks of the op `krylov_block` may be from torch's.
TRIAL_ERROR = 1e-3
# Below this λ_k/λ_1 the projection's eigenproblem is solved in float64: float32 leaves eps·λ_1.
STEEP_PROJECTION = 1e-3


def suits_krylov(rank: Rank, d: int) -> TypeGuard[int]:
    """Returns whether the rank is a few columns of a d-dimensional space."""
    return isinstance(rank, int) and d >= TUNING.krylov_rows and rank * TUNING.krylov_share <= d


@dataclass
class Schedule:
    """At which sizes of the basis to look at convergence.

    A look costs an eigenproblem of the basis, and on a GPU a wait, so it is not taken after every
    block: the logarithm of the angle falls about linearly with the size.
    """

    due: int  # the size of the next look
    k: int  # columns wanted
    width: int  # of a block
    largest: int  # the size at which the basis is full
    goal: float  # the sine to reach
    looks: int = 0  # how many have been taken
    before: tuple[int, float] | None = None  # the size and the sine at the last one

    def advance(self, size: int, sine: float) -> bool:
        """Sets the next look after one that found this sine; whether a basis may reach the goal."""
        slope = TUNING.usual_slope / self.k
        if self.before is not None and sine < self.before[1]:
            slope = math.log(self.before[1] / max(sine, TINY_SINE)) / (size - self.before[0])
        self.looks += 1
        # As far apart as with wide blocks: a look costs an eigenproblem, however narrow they are.
        step = max(8, min(32, self.k // 4)) * 2 ** max(0, self.looks - TUNING.early_looks)
        wanted = int(math.log(max(1.0, sine / self.goal)) / slope)
        self.due = min(self.largest, size + min(max(step, wanted), 4 * step))
        continues = self.before is not None
        self.before = size, sine
        return not continues or size + wanted <= self.largest


@dataclass(frozen=True)
class Outliers:
    """Values that hide the others from float32, and the matrix without them."""

    gram: AnyGram  # products with G of the whole matrix, in float32 with that of `rest`
    w: Tensor  # the whole matrix, [1, d, n]
    rest: Tensor  # w without `head`
    head: LeadingPairs  # the leading eigenpairs of G


@dataclass(frozen=True)
class Look:
    """Eigenpairs of G within the basis, and how well they converged."""

    values: Tensor  # [b, D], float64, descending, not negative
    vectors: Tensor  # [b, D, D], in the basis, as columns
    left: Tensor  # [b, D], float64, their residuals
    sines: list[float]  # the estimated sine of each matrix; NaN where the iteration cannot answer


def krylov_triplets(
    w: Tensor, norm: Tensor, k: int, tol: float, seed: int, stored: Tensor | None = None
) -> list[tuple[list[int], Triplets]]:
    """Computes the leading triplets of the matrices of w it can prove to `tol`.

    w: the stack [b, d, n], float32, d ≤ n. A matrix leaves it where it is proven or given up; until
    then all grow as deep as the hardest needs; norm: [b], ‖w‖_F; k: columns; tol: the sine of the
    largest principal angle to reach; seed: of the starting block; the same for every matrix, so
    that a stack equals its members; stored: w in 16 bits, where it was stored so. Returns parts of
    the stack: indices in it, and the triplets of the matrices there.
    """
    basis = _start_basis(
        w, norm, k, seed, stored if _takes_stored(w, norm, k, seed, stored) else None
    )
    first = max(k + 2 * count_guard(k), int(TUNING.first_look * k))
    gain = TUNING.refinement_gain if is_on_host(w) else TUNING.refinement_gain_gpu
    schedule = Schedule(
        min(basis.largest, first),
        k,
        basis.width,
        basis.largest,
        max(gain * tol, EPS32),
    )
    places, parts = list(range(len(w))), list[tuple[list[int], Triplets]]()
    reached = dict[int, float]()  # of a matrix, the sine that its last refinement proved
    outliers: Outliers | None = None
    alone = judged = is_on_host(w) and len(w) == 1
    while True:
        basis.expand()
        if judged and basis.size >= TUNING.first_size:
            judged = False
            top, rest = _judge_spectrum(basis)
            if top < TUNING.flat_ratio * rest:
                break
            if top > TUNING.outlier_ratio * rest:
                outliers = _take_outliers(basis, k)
            if outliers is not None:
                basis = _start_basis(outliers.rest, norm, k, seed, None)
                outliers.gram.single = basis.gram.single
                continue
        if basis.size >= schedule.due:
            look = _look_at(basis, k if outliers is None else k - len(outliers.head.theta))
            proven, stalled = list[int](), list[int]()
            ready = [i for i, sine in enumerate(look.sines) if sine <= schedule.goal]
            if ready:
                refined = _refine_ready(basis, look, ready, k, outliers)
                angles = refined.angle.tolist()
                rows = [row for row, sine in enumerate(angles) if sine <= tol]
                proven = [ready[row] for row in rows]
                # Rounding is the limit where a larger basis has not halved a bound below 1.
                for i, sine in zip(ready, angles, strict=True):
                    if 1 > sine > reached.get(places[i], math.inf) / 2:
                        stalled.append(i)
                    reached[places[i]] = sine
                parts.append(([places[i] for i in proven], refined.take(rows)))
            open_sines = {
                i: sine
                for i, sine in enumerate(look.sines)
                if i not in proven + stalled and not math.isnan(sine)
            }
            if not open_sines:
                break
            if not schedule.advance(basis.size, max(open_sines.values())) and alone:
                break
            if len(open_sines) < len(places):
                rest_of_them = list(open_sines)
                basis = basis.take(rest_of_them)
                places = [places[i] for i in rest_of_them]
        if basis.size >= basis.largest:
            break
        basis.append()
    return [part for part in parts if part[0]]


def count_guard(k: int) -> int:
    """Counts the Ritz vectors behind the k wanted ones for the refinement."""
    return max(16, min(32, k // 8))


def _takes_stored(w: Tensor, norm: Tensor, k: int, seed: int, stored: Tensor | None) -> bool:
    """Tries whether the op `krylov_block` finds the blocks, from w as it is stored."""
    if is_on_host(w) or stored is None or stored.dtype not in STORED:
        return False
    kernels = native.choose("krylov_block", w.device).kernels
    if kernels is None:
        return False

    def grow(stored: Tensor | None) -> list[Tensor]:
        """Returns the first two lengths and blocks of the projection, at the usual size."""
        basis = _start_basis(w, norm, k, seed, stored)
        lengths = list[Tensor]()
        for _ in range(TUNING.usual_basis * k // basis.width):
            basis.expand()
            lengths.append(basis.length())
            basis.append()
        return [torch.stack(lengths[:2]), basis.projected[:, : 2 * basis.width]]

    ways, sizes = (partial(grow, stored), partial(grow, None)), (*stored.shape, k)
    return trial.prefers_kernel("krylov_block", stored, sizes, ways, TRIAL_ERROR, kernels.sources)


def _start_basis(w: Tensor, norm: Tensor, k: int, seed: int, stored: Tensor | None) -> BlockBasis:
    """Starts with a random block, the same for every matrix and on every device."""
    b, d, n = w.shape
    gram: FormedGram | ImpliedGram = ImpliedGram(w)
    if stored is not None:
        stored = stored if stored.mT.is_contiguous() else stored.contiguous()
    elif _gram_pays((d, n), TUNING.usual_basis * k, k, float64_cost(w.device)):
        gram = FormedGram.of(w)
    width = max(8, min(_largest_width(gram.single), k // 4))
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(d, width, generator=generator, dtype=torch.float32, device="cpu")
    start = start.to(w.device, non_blocking=True).mT.expand(b, -1, -1)
    blocks = int(TUNING.largest_basis * d) // width
    return BlockBasis.begin(gram, w, norm, start, blocks, stored)


def _largest_width(factor: Tensor) -> int:
    """Returns the width of a block that suits a factor [b, d, n]: narrow where a cache holds it."""
    small = factor.shape[-2] * factor.shape[-1] * factor.element_size() <= TUNING.cached_bytes
    return 16 if small and is_on_host(factor) else 32


def _judge_spectrum(basis: BlockBasis) -> tuple[float, float]:
    """Returns the first eigenvalue in the basis of one matrix, and the mean outside.

    Of a flat spectrum both are about the same.
    """
    values = torch.linalg.eigvalsh(basis.penalised())[0].double()
    rest = (basis.norm[0].square() - values.sum()) / (basis.w.shape[1] - basis.size)
    return float(values[-1]), max(float(rest), 0.0)


def _take_outliers(basis: BlockBasis, k: int) -> Outliers | None:
    """Takes out the outliers of one matrix, fewer than k; None unless they converge at once."""
    w, norm = basis.w, float(basis.norm[0])
    head = find_head(basis.gram, norm**2, w.shape[1], TUNING.outlier_ratio)
    if head is None or k == 1:
        return None
    rows = head.rows[: k - 1]
    wide = w[0].double()
    rest = torch.addmm(wide, rows.mT, rows @ wide, alpha=-1).float()[None]
    return Outliers(basis.gram, w, rest, LeadingPairs(rows, head.theta[: k - 1]))


def _look_at(basis: BlockBasis, k: int) -> Look:
    """Applies Rayleigh-Ritz in the basis; the host waits for the sines.

    basis: with `expand` done; k: columns that must have converged.
    """
    projected = basis.penalised()
    seen = 2 * (k + count_guard(k))
    values, vectors = leading_eigh(projected, seen)
    if is_on_host(values) and bool((values[:, k - 1] < STEEP_PROJECTION * values[:, 0]).any()):
        values, vectors = leading_eigh(projected.double(), seen)
        vectors = vectors.float()
    sound = values.isfinite().all(-1)
    values = values.double()
    guarded = max(k + count_guard(k), 2 * count_guard(k))
    sound &= ~basis.counts_zero_rows(values[:, guarded - 1])
    sound &= ~_is_clustered(values[:, : k + 1], basis.width)
    values = values.clamp_min(0)
    # The residuals: what couples a Ritz vector to what the basis lacks.
    tails = torch.linalg.vector_norm(vectors[:, -basis.width :], dim=1)
    left = basis.length()[:, None] * tails
    sines = torch.where(sound, _estimate_sine(values, left, k).clamp_max(1e300), torch.nan)
    return Look(values, vectors, left, sines.tolist())


def _refine_ready(
    basis: BlockBasis, look: Look, ready: list[int], k: int, outliers: Outliers | None
) -> Triplets:
    """Refines the triplets of the matrices `ready`, whose Ritz vectors have converged."""
    values, vectors, left = look.values, look.vectors, look.left
    if len(ready) < len(values):
        basis = basis.take_grown(ready)
        values, vectors, left = (take_places(x, ready) for x in (values, vectors, left))
    cut = make_even_cut(basis.w, k, count_guard(k))
    size, d = basis.size, basis.w.shape[1]
    rows = vectors[..., : min(size, 2 * cut.near)].mT @ basis.rows[:, :size]
    gram: AnyGram = basis.gram
    w, head = basis.w, None
    if outliers is not None:
        gram, w, head = outliers.gram, outliers.w, outliers.head.rows[None]
        rows = torch.cat([head.float(), rows], 1)
        values = torch.cat([outliers.head.theta[None], values], 1)
        left = torch.nn.functional.pad(left, (head.shape[1], 0))
    seen = rows.shape[1]
    values = values[:, :seen]
    beyond = (basis.norm.square() - values.sum(-1)).clamp_min(0) / (d - seen)
    near, far = rows[:, : cut.near], rows[:, cut.near :]
    # A basis that ends with `near` leaves nothing further to compare with.
    ritz = Ritz(near, far, values, beyond, left[:, min(cut.near, seen - 1)], head)
    return refine_triplets(gram, w, basis.norm, ritz, cut, "krylov")


def _gram_pays(shape: tuple[int, int], size: int, k: int, float64: float) -> bool:
    """Returns whether forming wwᵀ [d, d] is cheaper than passing through w twice.

    size: columns of the basis; float64: flops in float32 that one in float64 costs.
    """
    d, n = shape
    with_gram = float64 * 1.25 * d * d * n + TUNING.narrow_cost * 2.0 * d * d * size
    without = TUNING.narrow_cost * 4.0 * d * n * size + float64 * 4.0 * d * n * k
    return with_gram < without


def _is_clustered(values: Tensor, width: int) -> Tensor:
    """Returns whether `width` of the descending values lie so close that others may hide."""
    first, last = values[:, : 1 - width or None], values[:, width - 1 :]
    return (first - last <= CLUSTER * first).any(-1)


def _estimate_sine(values: Tensor, left: Tensor, k: int) -> Tensor:
    """Estimates the sine [b] of the angle to the true subspace: residual over gap."""
    gaps = (values[:, :k] - values[:, k : k + 1]).clamp_min(1e-300)
    sine: Tensor = torch.linalg.vector_norm(left[:, :k] / gaps, dim=-1)
    return sine
