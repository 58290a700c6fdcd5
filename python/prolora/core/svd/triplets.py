"""Leading singular triplets of a stack, with bounds on their error."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..precision import EPS
from .products import multiply_narrow
from .stacks import take_places


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of w [b, d, n], d ≤ n."""

    short: Tensor  # [b, d, k] singular vectors of the short side, zero columns beyond `count`
    long: Tensor  # [b, n, k] of the long side, zero columns beyond `count`
    s: Tensor  # [b, k], float64, descending, zero beyond `count`
    count: Tensor  # int64 [b], columns in use
    following: Tensor  # [b], the estimate of the first singular value left out, 0 if there is none
    # [b], the larger of ‖w·long − short·s‖_F and ‖wᵀ·short − long·s‖_F, or a bound.
    residual: Tensor
    # [b], upper bound on the sine of the largest angle to the true subspaces, at most 1.
    angle: Tensor
    solvers: tuple[str, ...]  # the algorithm of each matrix

    def take(self, places: list[int]) -> Triplets:
        """Selects matrices of the stack."""
        if places == list(range(len(self.solvers))):
            return self
        fields = {name: take_places(getattr(self, name), places) for name in TENSORS}
        return Triplets(**fields, solvers=tuple(self.solvers[i] for i in places))

    def narrow(self, k: int) -> Triplets:
        """Drops the columns from k on, which no matrix uses."""
        if k == self.s.shape[-1]:
            return self
        return replace(self, **{name: getattr(self, name)[..., :k] for name in PADDED})


# The fields of Triplets that are tensors, and those of them that have k columns.
TENSORS = ("short", "long", "s", "count", "following", "residual", "angle")
PADDED = ("short", "long", "s")


def mark_failed(triplets: Triplets, sound: Tensor) -> Triplets:
    """Sets the angle to 1 where `sound`, bool [b], is false."""
    return replace(triplets, angle=torch.where(sound, triplets.angle, 1.0))


def merge_triplets(parts: list[tuple[list[int], Triplets]]) -> Triplets:
    """Joins parts of a stack at their indices, padded to one width."""
    if len(parts) == 1:
        return parts[0][1]
    k = max(part.s.shape[-1] for _, part in parts)
    fields = {}
    for name in TENSORS:
        tensors = [getattr(part, name) for _, part in parts]
        if name in PADDED:
            tensors = [torch.nn.functional.pad(x, (0, k - x.shape[-1])) for x in tensors]
        fields[name] = torch.cat(tensors)
    solvers = tuple(solver for _, part in parts for solver in part.solvers)
    places = [i for own, _ in parts for i in own]
    order = sorted(range(len(places)), key=places.__getitem__)
    return Triplets(**fields, solvers=solvers).take(order)


def rounding_error(w: Tensor, norm: Tensor) -> Tensor:
    """Bounds how far float64 products and LAPACK may move a singular value: [b].

    w: [b, d, n]; norm: [b], ‖w‖_F.
    """
    return norm * (10 * (w.shape[-2] + w.shape[-1]) * EPS)


@dataclass(frozen=True)
class Evidence:
    """What is known of triplets besides the residual ‖wv − σu‖."""

    ceiling: Tensor  # [b], upper bound on σ_{k+1}
    left: Tensor  # [b, k], ‖wᵀu − σv‖
    skew: Tensor  # [b], the larger of ‖UᵀU − I‖_F and ‖VᵀV − I‖_F as measured; NaN where unknown
    error: Tensor  # [b], `rounding_error`


def residual_and_angle(
    w: Tensor, factors: tuple[Tensor, Tensor, Tensor], count: Tensor, evidence: Evidence
) -> tuple[Tensor, Tensor]:
    """Computes the residual and angle of triplets of w from their residuals, in float64.

    Each vector i has residuals ρ_i² = ‖wv − σu‖² + ‖wᵀu − σv‖². Its distance from the subspace of
    the true leading vectors is at most ρ_i/(σ_i − σ_{k+1}) (Davis & Kahan, on the symmetric matrix
    [0 w; wᵀ 0]), and the sine of the largest angle at most the root of the sum of squares.

    w: [b, d, n]; factors: U [b, d, k], S [b, k] and V [b, n, k]; count: [b], columns in use;
    evidence: what else is known of them.
    """
    short, s, long = factors
    d, n = w.shape[-2:]
    k = s.shape[-1]
    right = torch.linalg.vector_norm(multiply_narrow(w, long) - short * s[:, None], dim=1)
    used = torch.arange(k, device=w.device) < count[:, None]
    # Rounding of the residuals themselves, spread evenly over the vectors.
    floor = (evidence.error / max(1, k) ** 0.5)[:, None]
    rho = (right.square() + evidence.left.square()).sqrt() + floor
    distance = s - evidence.ceiling[:, None]
    sines = torch.where(distance > 0, rho / distance.clamp_min(1e-300), 1.0) * used
    # The stored columns are orthonormal only up to this: LAPACK's to a small multiple of eps, and
    # those of the long side, wᵀu/σ, because VᵀV − I = Σ⁻¹Uᵀ(wV − UΣ). What was measured counts
    # where it is more.
    last = s.gather(-1, (count - 1).clamp_min(0)[:, None]).squeeze(-1)
    total = torch.linalg.vector_norm(right, dim=-1)
    expected = 20 * d * EPS + torch.where(last > 0, total / last.clamp_min(1e-300), 0.0)
    angle = torch.linalg.vector_norm(sines, dim=-1) + expected
    # A square matrix with every column kept spans everything, whatever its spectrum; and a zero
    # matrix has nothing to be found.
    everything = (count >= d) & (d == n) | (count == 0)
    angle = torch.where(everything, torch.zeros_like(angle), angle)
    expected = torch.where(everything, 20 * d * EPS, expected)
    worse = torch.where(evidence.skew <= expected, 0.0, evidence.skew)
    # Of columns with skew e the part outside the true subspace may be longer by 1/√(1 − e).
    angle = torch.where(worse < 1, angle / (1 - worse).clamp_min(1e-300).sqrt() + worse, 1.0)
    residual = torch.maximum(total, torch.linalg.vector_norm(evidence.left, dim=-1))
    return residual, angle.nan_to_num(1.0).clamp_max(1)
