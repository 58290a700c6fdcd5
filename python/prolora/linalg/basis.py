"""Leading singular subspaces of weights, each with a bound on how wrong it can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteWeights, ShapeMismatch
from . import krylov
from .arrays import to_tensor
from .precision import working_dtype
from .triplets import EPS, Rank, Triplets, dense_triplets, rounding_error

# The fields of a Basis: the factors, which have a dtype to choose, and what is known of them.
FACTORS = ("U", "S", "V")
FACTS = ("rank", "energy", "residual", "gap", "bound", "ok")
# float64 working set of one chunk of a stack, in bytes.
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Basis:
    """The leading singular triplets of one weight [m, n] or of a stack [..., m, n].

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
        rungs: the algorithm that produced each matrix of the stack, flattened.
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
    rungs: tuple[str, ...]

    @property
    def rung(self) -> str:
        """The algorithm used; of a stack, each one that was used, joined by '+'."""
        return "+".join(sorted(set(self.rungs)))

    @property
    def shape(self) -> torch.Size:
        """[..., m, n] of the weight."""
        return torch.Size((*self.U.shape[:-1], self.V.shape[-2]))

    def to(self, where: torch.dtype | torch.device | str) -> Basis:
        """U, S and V cast to a dtype, or every tensor moved to a device."""
        names = FACTORS if isinstance(where, torch.dtype) else FACTORS + FACTS
        moved = {name: getattr(self, name).to(where) for name in names}
        return Basis(**{**self.__dict__, **moved})

    def __getitem__(self, i: int) -> Basis:
        """The basis of matrix i of a stack [b, m, n], without the columns it does not use."""
        k = max(1, int(self.rank[i]))
        fields = {name: getattr(self, name)[i] for name in FACTS}
        fields |= {"U": self.U[i, :, :k], "S": self.S[i, :k], "V": self.V[i, :, :k]}
        return Basis(**fields, rungs=(self.rungs[i],))


def stack_bases(bases: list[Basis]) -> Basis:
    """Bases of single matrices [m, n] as the basis of their stack [b, m, n]."""
    return _gather([_batched(basis) for basis in bases], torch.Size((len(bases),)))


def _batched(basis: Basis) -> Basis:
    fields = {name: getattr(basis, name)[None] for name in FACTORS + FACTS}
    return Basis(**fields, rungs=basis.rungs)


def truncated_svd(W: Any, rank: Rank, *, tol: float = 1e-3, seed: int = 0) -> Basis:
    """Leading singular subspaces of W, never silently inaccurate.

    A ladder of algorithms. Few columns of a large matrix (k ≤ d/8, d ≥ 768) come from an adaptive
    block Krylov iteration; everything else, and whatever that leaves unproven, from the Gram matrix
    of the short side and its eigenvectors in float64; a spectrum that this cannot resolve (σ_k/σ_1
    below 1e-5) from LAPACK's SVD in float64. The bound is computed from the residuals of what is
    returned, so it holds whichever algorithm ran.

    Args:
        W: [m, n] or a stack [..., m, n], any float dtype.
        rank: columns (int ≥ 1) or the share of Σσ² to hold (float in (0, 1)). Never more than the
            numerical rank of W: directions that W does not have are not made up.
        tol: `ok` where bound ≤ tol.
        seed: of the Krylov iteration's starting block; the dense algorithms need none.

    Returns:
        A Basis; U, S, V are float64 for float64 weights and float32 otherwise.

    Raises:
        ValueError: a rank that is neither.
        ShapeMismatch: W has fewer than two dimensions or an empty side.
        NonFiniteWeights: W holds NaN or Inf.
    """
    weight = to_tensor(W)
    check_rank(rank)
    if weight.ndim < 2 or 0 in weight.shape[-2:]:
        raise ShapeMismatch(f"a weight must be [..., m, n] with m, n ≥ 1, not {list(weight.shape)}")
    stack = weight.detach().reshape(-1, *weight.shape[-2:])
    size = stack.shape[-2] * stack.shape[-1] * 8
    chunk = max(1, CHUNK_BYTES // size)
    parts = [_chunk_basis(part, rank, tol, seed) for part in stack.split(chunk)]
    return _gather(parts, weight.shape[:-2])


def check_rank(rank: Rank) -> None:
    """Raises ValueError unless rank is an int ≥ 1 or a float in (0, 1)."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank < 1
    if not (whole or share):
        raise ValueError(f"rank must be an int ≥ 1 or a share of energy in (0, 1), not {rank!r}")


def _chunk_basis(stack: Tensor, rank: Rank, tol: float, seed: int) -> Basis:
    """One chunk [b, m, n], through the ladder."""
    w = stack.double()
    scale = w.abs().amax((-2, -1), keepdim=True)  # NaN and Inf come through
    bad = (~scale.isfinite()).flatten().nonzero().flatten().tolist()
    if bad:
        raise NonFiniteWeights(f"NaN or Inf in weight{'s' if len(bad) > 1 else ''} {bad} of W")
    # Down to the range where neither σ² nor a sum of squares over- or underflows.
    w = w / torch.where(scale > 0, scale, 1.0)
    wide = w.shape[-1] >= w.shape[-2]
    w = w if wide else w.mT  # [b, d, n], d ≤ n, from here on
    found, quality = _ladder(w, rank, tol, seed)
    dtype = working_dtype(stack.dtype)
    short, long = found.short.to(dtype), found.long.to(dtype)
    for exact, stored in ((found.short, short), (found.long, long)):
        moved = torch.linalg.matrix_norm(exact - stored.double())
        quality["bound"] = (quality["bound"] + moved).clamp_max(1)
    return Basis(
        U=short if wide else long,
        V=long if wide else short,
        S=(found.s * scale.squeeze(-1)).to(dtype),
        rank=found.count,
        ok=quality["bound"] <= tol,
        rungs=tuple(found.rungs),
        **quality,
    )


def _ladder(w: Tensor, rank: Rank, tol: float, seed: int) -> tuple[Triplets, dict[str, Tensor]]:
    """Krylov where few columns are wanted; what it leaves unproven is factorised densely."""
    found = None
    if isinstance(rank, int) and krylov.suits(w.shape[-2], rank):
        found = krylov.krylov_triplets(w, rank, tol, seed)
    if found is None:
        found = dense_triplets(w, rank)
        return found, _quality(w, found)
    quality = _quality(w, found)
    unproven = (quality["bound"] > tol).nonzero().flatten()
    if len(unproven):
        found = found.replaced(unproven, dense_triplets(w[unproven], rank))
        quality = _quality(w, found)
    return found, quality


def _quality(w: Tensor, found: Triplets) -> dict[str, Tensor]:
    """Residual, gap, energy and bound of triplets of w [b, d, n], before they are stored.

    Each vector i has residuals ρ_i² = ‖wv − σu‖² + ‖wᵀu − σv‖². Its distance from the subspace of
    the true leading vectors is at most ρ_i/(σ_i − σ_{k+1}) (Davis & Kahan, on the symmetric matrix
    [0 w; wᵀ 0]), and the sine of the largest angle at most the root of the sum of squares.
    """
    d, n = w.shape[-2:]
    k = found.s.shape[-1]
    norm = torch.linalg.matrix_norm(w)
    safe_norm = torch.where(norm > 0, norm, 1.0)
    right = torch.linalg.vector_norm(w @ found.long - found.short * found.s[:, None], dim=1)
    used = torch.arange(k, device=w.device) < found.count[:, None]
    # Rounding of the residuals themselves, spread evenly over the vectors.
    floor = (rounding_error(w) / max(1, k) ** 0.5)[:, None]
    rho = (right.square() + found.left.square()).sqrt() + floor
    distance = found.s - found.ceiling[:, None]
    sines = torch.where(distance > 0, rho / distance.clamp_min(1e-300), 1.0) * used
    # The stored columns are orthonormal only up to this: LAPACK's to a small multiple of eps, and
    # those of the long side, wᵀu/σ, because VᵀV − I = Σ⁻¹Uᵀ(wV − UΣ).
    last = found.s.gather(-1, (found.count - 1).clamp_min(0)[:, None]).squeeze(-1)
    total = torch.linalg.vector_norm(right, dim=-1)
    skew = 20 * d * EPS + torch.where(last > 0, total / last.clamp_min(1e-300), 0.0)
    angle = torch.linalg.vector_norm(sines, dim=-1) + skew
    # A square matrix with every column kept spans everything, whatever its spectrum.
    everything = (found.count >= d) & (d == n) | (norm == 0)
    angle = torch.where(everything, torch.zeros_like(angle), angle)
    left = torch.linalg.vector_norm(found.left, dim=-1)
    return {
        "energy": (found.s.square().sum(-1) / safe_norm.square()).clamp_max(1),
        "residual": torch.maximum(total, left) / safe_norm,
        "gap": torch.where(last > 0, (last - found.following) / last.clamp_min(1e-300), 1.0),
        "bound": angle.clamp_max(1),
    }


def _gather(parts: list[Basis], batch: torch.Size) -> Basis:
    """The chunks of a stack as one Basis with the leading dimensions restored."""
    width = max((part.U.shape[-1] for part in parts), default=1)

    def widened(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))

    fields: dict[str, Any] = {}
    for name in FACTORS:
        fields[name] = torch.cat([widened(getattr(part, name)) for part in parts])
    for name in FACTS:
        fields[name] = torch.cat([getattr(part, name) for part in parts])
    fields = {name: x.reshape((*batch, *x.shape[1:])) for name, x in fields.items()}
    return Basis(**fields, rungs=tuple(rung for part in parts for rung in part.rungs))
