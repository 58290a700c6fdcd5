"""Leading singular subspaces of weights, with bounds on their error.

The bound comes from `residual_and_angle` in svd/triplets.py for the solvers in float64, and from
`bound_span_angle` in svd/bounds.py for the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arrays import MatrixLike, to_tensor
from .exceptions import NonFiniteWeights, ShapeMismatch
from .parallel import map_on_threads
from .precision import in_full_precision, is_finite, working_dtype
from .rank_rule import Rank, read_rank
from .short_text import format_range, format_shape, format_storage
from .svd import gram, krylov
from .svd.dense import dense_triplets
from .svd.factors import sample_residual
from .svd.few_columns import energy_triplets
from .svd.smaller_side import leading_triplets, solves_sides
from .svd.solvers import try_solver
from .svd.stacks import chunk_size, is_on_host, take_places
from .svd.triplets import Triplets, merge_triplets
from .validation import check_operand, refuse_vmap, without_gradient

# The fields of a Basis: its factors, which a dtype is chosen for, and the facts about them.
FACTORS = ("U", "S", "V")
FACTS = ("rank", "energy", "residual", "gap", "bound", "ok")
# Entries up to 2^±this need no scaling.
LARGEST_EXPONENT = 24
# Axes of the weights of convolutions in two and three dimensions.
CONVOLUTION = (4, 5)


@dataclass(frozen=True, repr=False, eq=False)
class Basis:
    """Leading singular triplets of one weight or of a stack.

    Attributes:
        U: [..., m, k], orthonormal columns; a matrix that needs fewer than k has zero columns.
        S: [..., k], descending.
        V: [..., n, k].
        rank: int64 [...], the columns in use.
        energy: [...], the share of ‖W‖_F² that these columns hold.
        residual: [...], the larger of ‖WV − US‖_F and ‖WᵀU − VS‖_F, over ‖W‖_F.
        gap: [...], (σ_k − σ_{k+1}) / σ_k at k = rank; 1 where nothing is left outside.
        bound: [...], upper bound on the sine of the largest principal angle between these subspaces
            and the true ones, left and right; 1 where the spectrum has no gap at k.
        ok: bool [...], whether the projectors are exact to the tolerance asked for.
        solvers: the algorithm that produced each matrix of the stack, flattened.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    rank: Tensor
    energy: Tensor
    residual: Tensor
    gap: Tensor
    bound: Tensor
    ok: Tensor
    solvers: tuple[str, ...]

    def __repr__(self) -> str:
        """Writes Basis(64×48, rank 8, float32, gram-f64, bound 2e-07)."""
        text = f"rank {format_range(self.rank)}, {format_storage(self.U)}, {self.solver}"
        return f"Basis({format_shape(self.shape)}, {text}, bound {format_range(self.bound, '.0e')})"

    @property
    def solver(self) -> str:
        """The algorithm used; of a stack, each one that was used, joined by '+'."""
        return "+".join(sorted(set(self.solvers)))

    @property
    def shape(self) -> torch.Size:
        """[..., m, n] of the weight."""
        return torch.Size((*self.U.shape[:-1], self.V.shape[-2]))

    def to(self, where: torch.dtype | torch.device | str) -> Basis:
        """Casts U, S and V to a dtype, or moves every tensor to a device."""
        names = FACTORS if isinstance(where, torch.dtype) else FACTORS + FACTS
        moved = {name: getattr(self, name).to(where) for name in names}
        return Basis(**{**self.__dict__, **moved})

    def __getitem__(self, i: int) -> Basis:
        """Returns the basis of matrix i of a stack, without its unused columns."""
        k = max(1, int(self.rank[i]))
        fields = {name: getattr(self, name)[i] for name in FACTS}
        fields |= {"U": self.U[i, :, :k], "S": self.S[i, :k], "V": self.V[i, :, :k]}
        return Basis(**fields, solvers=(self.solvers[i],))

    def take(self, places: Sequence[int]) -> Basis:
        """Selects matrices of a stack [b, m, n]; a view of those that lie side by side."""
        chosen: list[int] | slice = list(places)
        if chosen == list(range(places[0], places[0] + len(places))):
            chosen = slice(places[0], places[0] + len(places))
        fields = {name: getattr(self, name)[chosen] for name in FACTORS + FACTS}
        return Basis(**fields, solvers=tuple(self.solvers[i] for i in places))


def stack_bases(bases: list[Basis]) -> Basis:
    """Bases of single matrices [m, n] as the basis of their stack [b, m, n]."""
    alone = (
        Basis(
            **{name: getattr(basis, name)[None] for name in FACTORS + FACTS}, solvers=basis.solvers
        )
        for basis in bases
    )
    return _join_bases(list(alone), torch.Size((len(bases),)))


@refuse_vmap("truncated_svd")
@in_full_precision
def truncated_svd(W: MatrixLike, rank: Rank, *, tol: float = 1e-3, seed: int = 0) -> Basis:
    """Computes leading singular subspaces of W, never silently inaccurate.

    A ladder of algorithms; `solvers` says which one gave a result:

    - "krylov": few columns of a large matrix (k ≤ d/8, d ≥ 768), by a block Krylov iteration of
      adaptive depth;
    - "tridiagonal": one reduction of the Gram matrix of the short side to a tridiagonal one, in
      float64, then only the eigenvectors that are needed; on a CPU with the compiled extension;
    - "gram-f32": all eigenvectors of the Gram matrix in float32, whose rounding a step with float64
      residuals takes out; on a GPU (d ≥ 384);
    - "gram-f64": the same in float64 throughout;
    - "svd-f64": LAPACK's SVD, for spectra that a Gram matrix cannot resolve (σ_k/σ_1 < 1e-5).

    What one solver cannot prove to `tol`, the next one computes. The bound rests on residuals and
    orthonormality of what is returned. On the CPU the matrices of a stack share out the threads.

    Args:
        W: [m, n], a stack [b, m, n], or one convolution of four or five axes, as out × rest; any
            float dtype.
        rank: columns (int ≥ 1) or the share of Σσ² to hold (float in (0, 1)). Never more than the
            numerical rank of W: directions that W does not have are not made up.
        tol: `ok` where bound ≤ tol.
        seed: of the Krylov iteration's starting block; the dense algorithms need none.

    Returns:
        A Basis of torch tensors, whatever W is; U, S, V are float64 for float64 weights and float32
        otherwise. The same call gives the same bits, for a given device and number of threads.

    Raises:
        ValueError: a rank that is neither, or a tol that is negative or no number.
        ShapeMismatch: W has fewer than two dimensions or an empty side.
        NonFiniteWeights: W holds NaN or Inf.
        SolverFailure: no solver gave a result.
        UnsupportedTensor, UnsupportedDevice: W is sparse, complex, without data, not of floating
            point, inside of torch.func.vmap, or on a device other than cpu and cuda.
    """
    rank = read_rank(rank)
    if not tol >= 0:
        raise ValueError(f"tol must be a number of 0 or more, not {tol}")
    weight = _read_matrix(W, "W")
    stack = weight.reshape(-1, *weight.shape[-2:])
    exponents = _scale_exponents(stack, "W")
    few = stack.dtype != torch.float64 and krylov.suits_krylov(rank, min(stack.shape[-2:]))
    chunk = chunk_size(stack.shape[-2:], stack.device, few)
    scales = [exponents[i : i + chunk] for i in range(0, len(stack), chunk)]
    jobs = list(zip(stack.split(chunk), scales or [[]], strict=True))
    parts = map_on_threads(lambda job: _chunk_basis(*job, rank, tol, seed), jobs)
    return _join_bases(parts, weight.shape[:-2])


def read_weight(W: MatrixLike, name: str) -> Tensor:
    """Reads a finite weight or a stack of them [..., m, n], without its gradient.

    Raises:
        ShapeMismatch, NonFiniteWeights, UnsupportedTensor, UnsupportedDevice: as `truncated_svd`.
    """
    weight = _read_matrix(W, name)
    if not is_finite(weight):
        _scale_exponents(weight.reshape(-1, *weight.shape[-2:]), name)
    return weight


def _read_matrix(W: MatrixLike, name: str) -> Tensor:
    weight = to_tensor(W, name)
    check_operand(name, weight)
    weight = without_gradient("truncated_svd", name, weight)
    if weight.ndim < 2 or 0 in weight.shape[-2:]:
        raise ShapeMismatch(f"a weight must be [..., m, n] with m, n ≥ 1, not {list(weight.shape)}")
    weight = weight.flatten(1) if weight.ndim in CONVOLUTION else weight
    return weight.detach()


def _scale_exponents(stack: Tensor, name: str) -> list[int]:
    """Returns for each matrix the e with its largest entry between 2^(e-1) and 2^e.

    0 where that entry is so close to 1 that the matrix needs no scaling.

    Raises:
        NonFiniteWeights: names the matrices that hold NaN or Inf.
    """
    values = stack.float() if stack.element_size() == 1 else stack  # float8 has no maximum
    scale = torch.maximum(values.amax((-2, -1)), -values.amin((-2, -1))).tolist()
    bad = [i for i, largest in enumerate(scale) if not math.isfinite(largest)]  # NaN comes through
    if bad:
        raise NonFiniteWeights(f"NaN or Inf in weight{'s' if len(bad) > 1 else ''} {bad} of {name}")
    exponents = (math.frexp(largest)[1] for largest in scale)
    return [e if abs(e) > LARGEST_EXPONENT else 0 for e in exponents]


def _chunk_basis(stack: Tensor, exponents: list[int], rank: Rank, tol: float, seed: int) -> Basis:
    """Takes one chunk [b, m, n] through the ladder."""
    wide = stack.shape[-1] >= stack.shape[-2]
    dtype = working_dtype(stack.dtype)
    w = stack.to(dtype) if wide else stack.to(dtype).mT  # [b, d, n], d ≤ n, from here on
    # Scale to where neither σ² nor a sum of squares over- or underflows. The factor is a power of
    # two, so that float32 still holds the same values.
    scaled = any(exponents)
    if scaled:
        power = torch.tensor(exponents, device="cpu").to(w.device, non_blocking=True)[:, None]
        w = torch.ldexp(w.double(), -power[..., None]).to(dtype)
    rows = torch.linalg.vector_norm(w if wide else w.mT, dim=-1).double()
    norm = torch.linalg.vector_norm(rows, dim=-1)  # of float32 weights to 1e-8 or so
    stored = None if scaled else stack if wide else stack.mT
    basis = _descend_ladder(w, norm, rank, tol, seed, stored)
    safe_norm = torch.where(norm > 0, norm, 1.0)
    last = basis.s.gather(-1, (basis.count - 1).clamp_min(0)[:, None]).squeeze(-1)
    bound = basis.angle
    short, long = basis.short.to(dtype), basis.long.to(dtype)
    residual = basis.residual
    for exact, stored in ((basis.short, short), (basis.long, long)):
        if exact.dtype != dtype:
            bound = bound + torch.linalg.matrix_norm(exact - stored.double())
    if basis.short.dtype != dtype:  # the rounding of the factors counts in the residual, too
        rows = short.double().mT, long.double().mT
        residual = torch.maximum(
            residual, sample_residual(w.double(), rows[0], basis.s, rows[1])[0]
        )
    values = torch.ldexp(basis.s, power) if scaled else basis.s
    return Basis(
        U=short if wide else long,
        V=long if wide else short,
        S=values.to(dtype),
        rank=basis.count,
        energy=(basis.s.square().sum(-1) / safe_norm.square()).clamp_max(1),
        residual=residual / safe_norm,
        gap=torch.where(last > 0, (last - basis.following) / last.clamp_min(1e-300), 1.0),
        bound=bound.clamp_max(1),
        ok=bound <= tol,
        solvers=basis.solvers,
    )


def _descend_ladder(
    w: Tensor, norm: Tensor, rank: Rank, tol: float, seed: int, stored: Tensor | None
) -> Triplets:
    """Solves each matrix of w by the first solver that proves its result.

    w: [b, d, n], float32 or float64.
    """
    parts: list[tuple[list[int], Triplets]] = []
    if w.dtype == torch.float32 and krylov.suits_krylov(rank, w.shape[1]):
        parts = try_solver(partial(krylov.krylov_triplets, w, norm, rank, tol, seed, stored)) or []
    elif w.dtype == torch.float32 and isinstance(rank, float) and is_on_host(w) and len(w) == 1:
        few = try_solver(partial(energy_triplets, w, norm, rank, tol, seed))
        parts = [([0], few)] if few is not None else []
    missing = _list_missing(parts, range(len(w)))
    together = chunk_size(w.shape[-2:], w.device)
    for i in range(0, max(1, len(missing)), together):
        some = missing[i : i + together]
        if some or not parts:
            parts += _descend_dense(w, norm, some, rank, tol)
    return merge_triplets(parts)


def _descend_dense(
    w: Tensor, norm: Tensor, places: list[int], rank: Rank, tol: float
) -> list[tuple[list[int], Triplets]]:
    """Takes the matrices of w [b, d, n] at some indices through the dense solvers."""
    parts: list[tuple[list[int], Triplets]] = []
    some, its_norm = _take_both(w, norm, places)
    refined = None
    if w.dtype == torch.float32 and solves_sides(some):
        refined = try_solver(partial(leading_triplets, some, rank))
    elif w.dtype == torch.float32 and len(some) and not is_on_host(w):
        if gram.suits_gram(w.shape[-2], rank):
            refined = try_solver(partial(gram.gram_triplets, some, its_norm, rank))
    if refined is not None:
        parts = _select_proven(refined, tol)
    rows = _list_missing(parts, range(len(places)))
    if rows or not parts:
        rest, its_norm = _take_both(some, its_norm, rows)
        parts.append((rows, dense_triplets(rest.double(), its_norm, rank)))
    return [([places[row] for row in rows], part) for rows, part in parts]


def _list_missing(parts: list[tuple[list[int], Triplets]], places: range) -> list[int]:
    """Lists the indices that are in none of the parts."""
    taken = {place for own, _ in parts for place in own}
    return [place for place in places if place not in taken]


def _take_both(w: Tensor, norm: Tensor, places: list[int]) -> tuple[Tensor, Tensor]:
    """Selects the matrices at some indices, and their norms."""
    if len(places) == len(w):
        return w, norm
    return take_places(w, places), take_places(norm, places)


def _select_proven(triplets: Triplets, tol: float) -> list[tuple[list[int], Triplets]]:
    """Selects the triplets with a bound within the tolerance, with their indices."""
    facts = torch.stack([triplets.angle, triplets.count.double()]).tolist()
    places = [i for i, angle in enumerate(facts[0]) if angle <= tol]
    if not places:
        return []
    return [(places, triplets.take(places).narrow(max(int(facts[1][i]) for i in places)))]


def _join_bases(parts: list[Basis], batch: torch.Size) -> Basis:
    """Joins the chunks of a stack to one Basis with the leading dimensions restored."""
    width = max((part.U.shape[-1] for part in parts), default=1)

    def widened(tensor: Tensor) -> Tensor:
        missing = width - tensor.shape[-1]
        return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor

    fields: dict[str, Any] = {}
    for name in FACTORS:
        fields[name] = torch.cat([widened(getattr(part, name)) for part in parts])
    for name in FACTS:
        fields[name] = torch.cat([getattr(part, name) for part in parts])
    fields = {name: x.reshape((*batch, *x.shape[1:])) for name, x in fields.items()}
    return Basis(**fields, solvers=tuple(solver for part in parts for solver in part.solvers))
