"""The copy, damped where the target has drifted: our extension, without any SVD.

A fine-tune changes a weight along few directions and leaves the rest alone. An update that reads or
writes those directions meets features that are no longer what it was trained on; elsewhere it keeps
its meaning. So each direction is weakened by how much of the weight drifted along it:

    ΔW_t = (I + κ_l D Dᵀ)⁻¹ ΔW (I + κ_r Dᵀ D)⁻¹,   D = W_t − W_s,
    κ_l = κ m / ‖W_s‖²,  κ_r = κ n / ‖W_s‖².

With W_t = W_s this is the copy. Drift spread evenly over all directions weakens the whole update
by about 1/(1 + κ (‖D‖/‖W_s‖)²)² where m = n. Nothing depends on a sign or an order of singular
vectors, and the rank stays r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .lowrank import LowRank
from .precision import working_dtype
from .svd.products import lower_gram


def damped(delta: LowRank, source: Tensor, target: Tensor, kappa: float | Tensor) -> LowRank:
    """The update of a stack, damped along the drift of its weights.

    Args:
        delta: the source's updates, up [..., m, r] and down [..., r, n], scale included.
        source: W_s [..., m, n].
        target: W_t, likewise.
        kappa: κ ≥ 0, one number or one for each matrix [...]; 0 copies.

    Returns:
        The updates of the target, of the same rank and dtype. Flops ≈ 2mn·min(m, n) per matrix
        for the Gram matrix and min(m, n)³ for its factorisation.
    """
    check_kappa(kappa)
    return Damper(source, target, delta.up.dtype).at(kappa)(delta)


def check_kappa(kappa: float | Tensor) -> None:
    """Raises ValueError unless κ, one number or several, is finite and at least 0."""
    values = torch.as_tensor(kappa, dtype=torch.float64)
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(f"kappa must be a finite number ≥ 0, not {kappa!r}")


class Damper:
    """A stack of pairs of weights, ready to damp the updates of any number of LoRAs."""

    def __init__(self, source: Tensor, target: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Takes W_s and W_t [..., m, n]; works in `dtype` or float32, whichever is wider."""
        self._work = working_dtype(dtype)
        source, target = source.detach(), target.detach()
        ours = source.to(self._work)  # any storage dtype; float8 takes part in no arithmetic
        # In place: touching memory for the first time takes as long as what is computed there.
        self._drift = target.to(self._work, copy=True).sub_(ours)
        self._size = _squared_norms(ours)
        m, n = self._drift.shape[-2:]
        self._tall = self._drift if m >= n else self._drift.mT
        self._gram = lower_gram(self._tall.mT, self._work)  # DᵀD on the short side
        self._damping: dict[float, Damping] = {}

    def at(self, kappa: float | Tensor) -> Damping:
        """The damping at one κ (or one for each matrix [...]), kept if it is a number."""
        if not isinstance(kappa, Tensor) and kappa in self._damping:
            return self._damping[kappa]
        work, (m, n) = self._work, self._drift.shape[-2:]
        each = torch.as_tensor(kappa, dtype=work, device=self._drift.device)
        # A source near zero would ask for endless damping; I + ρ DᵀD must stay definite in
        # rounding.
        least = _squared_norms(self._drift) * each * max(m, n) * torch.finfo(work).eps * 64
        norm = torch.maximum(self._size, least).clamp_min(torch.finfo(work).tiny)
        rates = (each / norm * m, each / norm * n)
        factors = [_factorise_damping(self._gram, rates[0])]
        factors.append(factors[0] if m == n else _factorise_damping(self._gram, rates[1]))
        made = Damping(self._tall, m >= n, rates, (factors[0], factors[1]))
        if not isinstance(kappa, Tensor):
            self._damping[kappa] = made
        return made


@dataclass(frozen=True)
class Damping:
    """Both sides of the formula, factorised.

    Attributes:
        tall: D or Dᵀ [..., l, d], whichever is tall.
        is_tall: it is D.
        rates: ρ of the left and of the right side.
        factors: Cholesky factors of I + ρ DᵀD on the short side, [..., d, d], for both.
    """

    tall: Tensor
    is_tall: bool
    rates: tuple[Tensor, Tensor]
    factors: tuple[Tensor, Tensor]

    def __call__(self, delta: LowRank, places: list[int] | None = None) -> LowRank:
        """Damps updates [..., m, r] and [..., r, n], of some matrices of the stack or of all."""
        work = self.tall.dtype
        tall, rates, factors = self.tall, self.rates, self.factors
        if places is not None and len(places) < len(tall):
            tall = tall[places]
            rates = (_select_rates(rates[0], places), _select_rates(rates[1], places))
            factors = (factors[0][places], factors[1][places])
        up, down = delta.up.to(work), delta.down.to(work).mT  # [..., m, r], [..., n, r]
        left, right = (
            (_solve_long_side, _solve_short_side)
            if self.is_tall
            else (_solve_short_side, _solve_long_side)
        )
        up = left(up, tall, factors[0], rates[0])
        down = right(down, tall, factors[1], rates[1])
        return LowRank(up, down.mT).to(delta.up.dtype)


def _select_rates(rate: Tensor, places: list[int]) -> Tensor:
    return rate[places] if rate.ndim else rate


def _solve_short_side(x: Tensor, tall: Tensor, factor: Tensor, rate: Tensor) -> Tensor:
    """(I + ρ DᵀD)⁻¹ x on the short side: x [..., d, r]."""
    return torch.cholesky_solve(x, factor)


def _solve_long_side(x: Tensor, tall: Tensor, factor: Tensor, rate: Tensor) -> Tensor:
    """(I + ρ DDᵀ)⁻¹ x = x − ρ D (I + ρ DᵀD)⁻¹ Dᵀx on the long side (Woodbury): x [..., l, r]."""
    inner = torch.cholesky_solve(tall.mT @ x, factor)
    return x - rate[..., None, None] * (tall @ inner)


def _factorise_damping(gram: Tensor, rate: Tensor) -> Tensor:
    shifted = rate[..., None, None] * gram  # of which only the lower triangle means anything
    shifted.diagonal(dim1=-2, dim2=-1).add_(1)
    factor: Tensor = torch.linalg.cholesky(shifted)
    return factor


def _squared_norms(x: Tensor) -> Tensor:
    """‖X‖_F² [...] of x [..., m, n]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return norm.square()
