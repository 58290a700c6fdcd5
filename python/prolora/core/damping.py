"""The copy, damped where the target has drifted: our extension, without any SVD.

A fine-tune changes a weight along few directions and leaves the rest alone. An update that reads or
writes those directions meets features that it was not trained on; elsewhere it keeps its meaning.
So each direction is weakened by how much the weight drifted along it:

    ΔW_t = (I + κ_l D Dᵀ)⁻¹ ΔW (I + κ_r Dᵀ D)⁻¹,   D = W_t − W_s,
    κ_l = κ m / ‖W_s‖²,  κ_r = κ n / ‖W_s‖².

With W_t = W_s this is the copy. Drift spread evenly over all directions weakens the whole update
by about 1/(1 + κ (‖D‖/‖W_s‖)²)² where m = n. Nothing depends on a sign or an order of singular
vectors, and the rank stays r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .errors import ShapeMismatch
from .lowrank import LowRank
from .parallel import map_on_threads
from .precision import in_full_precision, working_dtype
from .svd.products import lower_gram
from .svd.stacks import decides_freely
from .thin_damping import count_rounds, damp_thinly
from .validation import check_operand, refuse_gradients, refuse_vmap

ROOM = 16
"""By so much earlier float64 is taken than float32 fails, so that the result errs below 1e-4."""

SAFE_EXPONENT = 40
"""Weights between 2⁻⁴⁰ and 2⁴⁰ have sums of squares that float32 holds."""


@refuse_vmap("damped")
@in_full_precision
def damped(delta: LowRank, source: Tensor, target: Tensor, kappa: float | Tensor) -> LowRank:
    """The update of a stack, damped along the drift of its weights.

    Args:
        delta: the source's updates, up [..., m, r] and down [..., r, n], scale included.
        source: W_s [..., m, n].
        target: W_t [..., m, n].
        kappa: κ ≥ 0, one number or one for each matrix [...]; 0 copies. It is applied as given: a
            stack in which it is too large for float32 is computed in float64.

    Returns:
        The updates of the target, of the same rank and dtype. On the CPU a few columns are damped
        by some 7 to 12 rounds of 4mnr flops per matrix, to 1e-5 of the update's norm; where that is
        more work, or does not get there, by a Gram matrix and its factorisation, 5/4 min(m, n)·mn
        and min(m, n)³/3.

    Raises:
        ValueError: κ is negative or not finite.
        ShapeMismatch: delta, source and target do not have one shape, or κ is for other stacks.
        UnsupportedTensor, UnsupportedDevice: as `truncated_svd`.
        NotImplementedError: a derivative with respect to a weight is asked for.
    """
    check_kappa(kappa, delta.shape[:-2])
    for name, weight in (("source", source), ("target", target)):
        check_operand(name, weight)
        refuse_gradients("damped", name, weight)
        if weight.shape != delta.shape:
            raise ShapeMismatch(f"{name} is {list(weight.shape)} but delta {list(delta.shape)}")
    return Damper(source, target, delta.up.dtype, delta.rank).at(kappa)(delta)


def check_kappa(kappa: float | Tensor, stack: torch.Size) -> None:
    """Checks κ, one number or one for each matrix of a stack [...].

    Raises:
        ValueError: it is no number, negative or not finite.
        ShapeMismatch: several numbers, but not one for each matrix.
    """
    try:
        values = torch.as_tensor(kappa, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"kappa must be a finite number ≥ 0, not {kappa!r}") from error
    if values.ndim and values.shape != stack:
        raise ShapeMismatch(
            f"kappa is {list(values.shape)}, but the stack of weights {list(stack)}"
        )
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(f"kappa must be a finite number ≥ 0, not {kappa!r}")


class Damper:
    """A stack of pairs of weights, ready to damp the updates of any number of LoRAs."""

    @in_full_precision
    def __init__(
        self,
        source: Tensor,
        target: Tensor,
        dtype: torch.dtype = torch.float32,
        columns: int | None = None,
    ) -> None:
        """Takes a stack of pairs.

        Args:
            source: W_s [..., m, n].
            target: W_t.
            dtype: it works in this or in float32, whichever is wider.
            columns: of all updates together that will be damped; None means many.
        """
        work = working_dtype(dtype)
        source, target = source.detach(), target.detach()
        # Any storage dtype; float8 takes part in no arithmetic.
        ours, theirs = _scale_together(source.to(work), target.to(work))
        # In place: touching memory for the first time takes as long as what is computed there.
        self._drift = theirs - ours if theirs is target else theirs.sub_(ours)
        self._size = _squared_norms(ours)
        self._drifted = _squared_norms(self._drift)
        self._grams: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._damping: dict[float, Damping | ThinDamping] = {}
        thin = columns is not None and work == torch.float32 and decides_freely(source)
        self._rounds = count_rounds(source.shape[-2:], columns or 1) if thin else 0

    @in_full_precision
    def at(self, kappa: float | Tensor) -> Damping | ThinDamping:
        """The damping at one κ (or one for each matrix [...]), kept if it is a number."""
        if not isinstance(kappa, Tensor) and kappa in self._damping:
            return self._damping[kappa]
        work = self._drift.dtype
        if bool((ROOM * self._least_norm(kappa, work) > self._size).any()):
            work = torch.float64
        rates = self._find_rates(kappa, work)
        made: Damping | ThinDamping
        if self._rounds and work == torch.float32:
            made = ThinDamping(self._drift, rates, self._rounds, partial(self._factorise, rates))
        else:
            made = self._factorise(rates)
        if not isinstance(kappa, Tensor):
            self._damping[kappa] = made
        return made

    def _least_norm(self, kappa: float | Tensor, work: torch.dtype) -> Tensor:
        """‖W_s‖² [...] from which on I + ρ DᵀD can be factorised in `work` without a loss."""
        each = torch.as_tensor(kappa, dtype=work, device=self._drift.device)
        drifted = self._drifted.to(work)
        return drifted * each * max(self._drift.shape[-2:]) * torch.finfo(work).eps * 64

    def _find_rates(self, kappa: float | Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
        """ρ of both sides, in `work`.

        A source near zero would ask for endless damping: in float64 it ends where a direction that
        drifted keeps 1e-14 of itself.
        """
        m, n = self._drift.shape[-2:]
        each = torch.as_tensor(kappa, dtype=work, device=self._drift.device)
        norm = torch.maximum(self._size.to(work), self._least_norm(kappa, work))
        # Without drift there is nothing to damp, whatever the norm of the source.
        norm = torch.where(self._drifted > 0, norm.clamp_min(torch.finfo(work).tiny), torch.inf)
        return each / norm * m, each / norm * n

    def _factorise(self, rates: tuple[Tensor, Tensor]) -> Damping:
        """The damping of the whole stack, by Gram matrices in the precision of the rates."""
        m, n = self._drift.shape[-2:]
        tall, gram = self._short_gram(rates[0].dtype)
        factors = [_factorise_damping(gram, rates[0])]
        factors.append(factors[0] if m == n else _factorise_damping(gram, rates[1]))
        return Damping(tall, m >= n, rates, (factors[0], factors[1]))

    def _short_gram(self, work: torch.dtype) -> tuple[Tensor, Tensor]:
        """D or Dᵀ, whichever is tall, and its Gram matrix on the short side, in `work`."""
        if work not in self._grams:
            m, n = self._drift.shape[-2:]
            tall = (self._drift if m >= n else self._drift.mT).to(work)
            self._grams[work] = tall, lower_gram(tall.mT, work)
        return self._grams[work]


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

    @in_full_precision
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


@dataclass
class ThinDamping:
    """Both sides of the formula for few columns, without a factorisation, matrix by matrix.

    Attributes:
        drift: D [..., m, n].
        rates: ρ of the left and of the right side.
        rounds: at most, for each matrix.
        factorise: makes the Damping of the whole stack for what does not converge.
    """

    drift: Tensor
    rates: tuple[Tensor, Tensor]
    rounds: int
    factorise: Callable[[], Damping]

    @in_full_precision
    def __call__(self, delta: LowRank, places: list[int] | None = None) -> LowRank:
        """Damps updates [..., m, r] and [..., r, n], of some matrices of the stack or of all."""
        drift = self.drift.flatten(0, -3) if self.drift.ndim > 2 else self.drift[None]
        work = drift.dtype
        ups, downs = (x.to(work).reshape(-1, *x.shape[-2:]) for x in (delta.up, delta.down))
        rates = [rate.expand(self.drift.shape[:-2]).flatten().tolist() for rate in self.rates]
        chosen = list(range(len(drift))) if places is None else places

        def damp(i: int) -> tuple[Tensor, Tensor] | None:
            place = chosen[i]
            both = rates[0][place], rates[1][place]
            return damp_thinly(drift[place], ups[i], downs[i], both, self.rounds)

        # Where the first does not converge the others of a stack would hardly.
        found = [damp(0)] if chosen else []
        if found and found[0] is not None:
            found += map_on_threads(damp, list(range(1, len(chosen))))
        if any(pair is None for pair in found):
            return self._factorised(delta, places)
        up, down = (
            (
                torch.stack([pair[side] for pair in found if pair is not None]).reshape(whole.shape)
                for side, whole in enumerate((delta.up, delta.down))
            )
            if found
            else (delta.up, delta.down)
        )
        return LowRank(up, down).to(delta.up.dtype)

    @cached_property
    def _factorised(self) -> Damping:
        return self.factorise()


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
    shifted = rate[..., None, None] * gram  # only the lower triangle means anything
    shifted.diagonal(dim1=-2, dim2=-1).add_(1)
    factor: Tensor = torch.linalg.cholesky(shifted)
    return factor


def _scale_together(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of weights [..., m, n], divided by a power of two where squares leave the range.

    The damping depends on their proportion alone, and a power of two costs no bit.
    """
    largest = torch.maximum(*(vector_norm(x, math.inf, dim=(-2, -1)) for x in (source, target)))
    most = math.frexp(torch.finfo(largest.dtype).max)[1] - 2
    exponent = largest.frexp().exponent.clamp(-most, most)
    exponent = torch.where(exponent.abs() > SAFE_EXPONENT, exponent, 0)
    if not bool(exponent.any()):
        return source, target
    factor = torch.ldexp(torch.ones_like(largest), -exponent)[..., None, None]
    return source * factor, target * factor


def _squared_norms(x: Tensor) -> Tensor:
    """‖X‖_F² [...] of x [..., m, n]."""
    norm: Tensor = vector_norm(x, dim=(-2, -1))
    return norm.square()
