"""Leading singular subspaces of weights, each with a bound on how wrong it can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteWeights, ShapeMismatch
from .arrays import to_tensor
from .precision import working_dtype
from .recompression import columns_holding

Rank = int | float
"""An int is that many columns; a float in (0, 1) the smallest number holding that share of Σσ²."""

EPS = torch.finfo(torch.float64).eps
# Below this σ_k/σ_1 the eigenvalues of the Gram matrix lose σ_k to rounding (√(d·eps) ≈ 1e-6).
GRAM_RANGE = 1e-5
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
            and the true ones, left and right (Wedin); 1 where the spectrum has no gap at k.
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
        """U, S and V cast to a dtype or moved to a device."""
        moved = {name: getattr(self, name).to(where) for name in ("U", "S", "V")}
        return Basis(**{**self.__dict__, **moved})


def truncated_svd(W: Any, rank: Rank, *, tol: float = 1e-3, seed: int = 0) -> Basis:
    """Leading singular subspaces of W, never silently inaccurate.

    The Gram matrix of the short side and its eigenvectors, both in float64 whatever the storage
    dtype; a matrix whose spectrum that cannot resolve (σ_k/σ_1 below 1e-5) goes to LAPACK's SVD in
    float64. The bound is computed from the residuals of what is returned (Wedin's theorem:
    ‖sin Θ‖ ≤ ‖R‖ / (σ_k − σ_{k+1})), so it holds whichever algorithm ran.

    Args:
        W: [m, n] or a stack [..., m, n], any float dtype.
        rank: columns (int ≥ 1) or the share of Σσ² to hold (float in (0, 1)). Never more than the
            numerical rank of W: directions that W does not have are not made up.
        tol: `ok` where bound ≤ tol.
        seed: for algorithms that start from random vectors; the exact ones ignore it.

    Returns:
        A Basis; U, S, V are float64 for float64 weights and float32 otherwise.

    Raises:
        ValueError: a rank that is neither.
        ShapeMismatch: W has fewer than two dimensions or an empty side.
        NonFiniteWeights: W holds NaN or Inf.
    """
    del seed
    weight = to_tensor(W)
    check_rank(rank)
    if weight.ndim < 2 or 0 in weight.shape[-2:]:
        raise ShapeMismatch(f"a weight must be [..., m, n] with m, n ≥ 1, not {list(weight.shape)}")
    stack = weight.detach().reshape(-1, *weight.shape[-2:])
    size = stack.shape[-2] * stack.shape[-1] * 8
    chunk = max(1, CHUNK_BYTES // size)
    parts = [_chunk_basis(stack[i : i + chunk], rank, tol) for i in range(0, stack.shape[0], chunk)]
    return _gather(parts, weight.shape[:-2])


def check_rank(rank: Rank) -> None:
    """Raises ValueError unless rank is an int ≥ 1 or a float in (0, 1)."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank < 1
    if not (whole or share):
        raise ValueError(f"rank must be an int ≥ 1 or a share of energy in (0, 1), not {rank!r}")


def _chunk_basis(stack: Tensor, rank: Rank, tol: float) -> Basis:
    """One chunk [b, m, n], through the ladder."""
    w = stack.double()
    finite = w.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise NonFiniteWeights(f"NaN or Inf in weight{'s' if len(bad) > 1 else ''} {bad} of W")
    # Down to the range where neither σ² nor a sum of squares over- or underflows.
    scale = w.abs().amax((-2, -1), keepdim=True)
    w = w / torch.where(scale > 0, scale, 1.0)
    wide = w.shape[-1] >= w.shape[-2]
    w = w if wide else w.mT  # [b, d, n], d ≤ n, from here on
    triplets = _triplets(w, rank)
    dtype = working_dtype(stack.dtype)
    quality = _quality(w, triplets, dtype)
    short, long = triplets.short.to(dtype), triplets.long.to(dtype)
    return Basis(
        U=short if wide else long,
        V=long if wide else short,
        S=(triplets.kept * scale.squeeze(-1)).to(dtype),
        rank=triplets.count,
        ok=quality["bound"] <= tol,
        rungs=tuple("svd-f64" if fallen else "gram-f64" for fallen in triplets.fallen.tolist()),
        **quality,
    )


@dataclass(frozen=True)
class _Triplets:
    """Leading singular triplets of w [b, d, n], d ≤ n, in float64.

    Attributes:
        short: [b, d, k] singular vectors of the short side, zero columns beyond `count`.
        long: [b, n, k] of the long side, likewise.
        s: [b, d] all singular values.
        count: [b] columns in use.
        fallen: bool [b], whether the Gram matrix was not enough and LAPACK's SVD ran.
        left: [b], ‖wᵀ·short − long·s‖_F where it is not zero by construction.
    """

    short: Tensor
    long: Tensor
    s: Tensor
    count: Tensor
    fallen: Tensor
    left: Tensor

    @property
    def kept(self) -> Tensor:
        """[b, k], the singular values in use, zero beyond `count`."""
        k = self.short.shape[-1]
        return self.s[:, :k] * (torch.arange(k, device=self.s.device) < self.count[:, None])


def _triplets(w: Tensor, rank: Rank) -> _Triplets:
    """Eigenvectors of wwᵀ where they resolve the spectrum down to σ_k, LAPACK's SVD elsewhere."""
    values, vectors = torch.linalg.eigh(w @ w.mT)
    short, s = vectors.flip(-1), values.flip(-1).clamp_min(0).sqrt()
    count = _columns(s, rank, w.shape[-2:])
    last = s.gather(-1, (count - 1).clamp_min(0)[:, None]).squeeze(-1)
    fallen = (last < GRAM_RANGE * s[:, 0]) & (s[:, 0] > 0)
    right: dict[int, Tensor] = {}
    for i in fallen.nonzero().flatten().tolist():
        short[i], s[i], vt = torch.linalg.svd(w[i], full_matrices=False)
        right[i] = vt.mT
    count = _columns(s, rank, w.shape[-2:])
    k = max(1, int(count.max())) if len(w) else 1
    used = (torch.arange(k, device=w.device) < count[:, None])[:, None]
    short = short[..., :k] * used
    values = s[:, None, :k]
    long = w.mT @ short / torch.where(values > 0, values, 1.0)
    left = torch.zeros_like(last)
    for i, vectors in right.items():
        long[i] = vectors[:, :k] * used[i]
        left[i] = (w[i].mT @ short[i] - long[i] * values[i]).norm()
    return _Triplets(short, long, s, count, fallen, left)


def _columns(s: Tensor, rank: Rank, shape: torch.Size) -> Tensor:
    """How many columns the rule asks for, at most the numerical rank: int64 [b]."""
    numerical = (s > max(shape) * EPS * s[:, :1]).sum(-1)
    if isinstance(rank, float):
        wanted = columns_holding(s, rank)
    else:
        wanted = torch.full_like(numerical, rank)
    return torch.minimum(wanted, numerical)


def _quality(w: Tensor, found: _Triplets, dtype: torch.dtype) -> dict[str, Tensor]:
    """Residual, gap, energy and bound of triplets of w [b, d, n] that are stored in `dtype`."""
    d, n = w.shape[-2:]
    norm = torch.linalg.matrix_norm(w)
    safe_norm = torch.where(norm > 0, norm, 1.0)
    kept = found.kept
    right = torch.linalg.matrix_norm(w @ found.long - found.short * kept[:, None])
    residual = torch.maximum(right, found.left)
    # The first value left outside, raised by what rounding may have hidden of it: the error of
    # λ is that of forming the Gram matrix and of a backward stable eigensolver, both relative to
    # ‖w‖_F². σ = √λ; for LAPACK's SVD the error is relative to ‖w‖_F itself.
    padded = torch.cat([found.s, found.s.new_zeros(len(w), 1)], -1)
    outside = padded.gather(-1, found.count[:, None]).squeeze(-1)
    last = padded.gather(-1, (found.count - 1).clamp_min(0)[:, None]).squeeze(-1)
    rounding = 10 * (d + n) * EPS * norm
    blurred = torch.where(
        found.fallen, outside + rounding, (outside.square() + rounding * norm).sqrt()
    )
    exhausted = found.count >= d
    distance = last - torch.where(exhausted, torch.zeros_like(blurred), blurred)
    wedin = (right.square() + found.left.square()).sqrt() + rounding
    angle = torch.where(distance > 0, wedin / distance.clamp_min(1e-300), torch.ones_like(norm))
    # LAPACK's vectors are orthonormal to a small multiple of eps. The long side's are wᵀu/σ, and
    # VᵀV − I = Σ⁻¹Uᵀ(wV − UΣ): no product of k columns with k columns is needed to know it.
    skew = 20 * d * EPS + torch.where(last > 0, right / last.clamp_min(1e-300), 0.0)
    # A square matrix with every column kept spans everything, whatever its spectrum.
    everything = exhausted & (d == n) | (norm == 0)
    angle = torch.where(everything, torch.zeros_like(angle), angle + skew)
    stored = sum(
        torch.linalg.matrix_norm(side - side.to(dtype).double())
        for side in (found.short, found.long)
    )
    return {
        "energy": (kept.square().sum(-1) / safe_norm.square()).clamp_max(1),
        "residual": residual / safe_norm,
        "gap": torch.where(last > 0, (last - outside) / last.clamp_min(1e-300), 1.0),
        "bound": (angle + stored).clamp_max(1),
    }


def _gather(parts: list[Basis], batch: torch.Size) -> Basis:
    """The chunks of a stack as one Basis with the leading dimensions restored."""
    width = max((part.U.shape[-1] for part in parts), default=1)

    def widened(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))

    fields: dict[str, Any] = {}
    for name in ("U", "S", "V"):
        fields[name] = torch.cat([widened(getattr(part, name)) for part in parts])
    for name in ("rank", "energy", "residual", "gap", "bound", "ok"):
        fields[name] = torch.cat([getattr(part, name) for part in parts])
    fields = {name: x.reshape((*batch, *x.shape[1:])) for name, x in fields.items()}
    return Basis(**fields, rungs=tuple(rung for part in parts for rung in part.rungs))
