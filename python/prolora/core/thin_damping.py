"""The damping of an update from its thin factors, by products with the drift alone.

Both sides of (I + ρ_l DDᵀ)⁻¹ up and (I + ρ_r DᵀD)⁻¹ downᵀ come from one block Krylov iteration of
[0 D; Dᵀ 0], which starts with the orthonormal factors of the update. In its bases D is block
tridiagonal, so each round costs two products with D and eliminates one small block; what the next
round would add says when to stop. The result is then measured: its residual for a few random
combinations of the update's columns, by four narrow products. As the inverses shorten every vector,
the residual bounds the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

GOAL = 4e-6
"""The error to reach, relative to the norm of the update."""

ALLOWED = 1e-5
"""A result whose residual is measured to be larger is not given."""

PROBES = 4
"""Random combinations of columns behind that measure. It falls short of a quarter of the truth with
a chance of 7e-3 at most, and the error has been estimated before."""

USUAL_ROUNDS = 10
"""Rounds that the drifts of fine-tunes take, 7 to 10; where fewer can be afforded none is tried."""

MOST_ROUNDS = 24
FIRST_JUDGED = 5
"""From this round on the speed of convergence says whether it will end in time."""

NARROW = 1.4
"""A flop of a narrow product takes so much longer than one of a Gram matrix."""

ROUND = 2e7
"""Flops that the small steps of a round take the time of."""

CANCELLED = 1e-2
"""A direction of which less is left is made orthogonal a second time."""


def count_rounds(shape: Sequence[int], columns: int) -> int:
    """How many rounds cost no more than a factorisation for D [m, n]; 0 where that is cheaper.

    Args:
        shape: of D.
        columns: of all updates together that are damped along it.
    """
    m, n = shape
    short, long = min(shape), max(shape)
    factors = 1 if m == n else 2
    dense = 1.25 * short**2 * long + factors * short**3 / 3 + 4.0 * short * long * columns
    rounds = int(dense / (NARROW * 4.0 * m * n * max(1, columns) + ROUND))
    # The bases must have room for all blocks.
    rounds = min(rounds, MOST_ROUNDS, short // max(1, columns) - 2)
    return rounds if rounds >= USUAL_ROUNDS else 0


def damp_thinly(
    drift: Tensor, up: Tensor, down: Tensor, rates: tuple[float, float], rounds: int
) -> tuple[Tensor, Tensor] | None:
    """The damped factors; None where they do not come out to ALLOWED within so many rounds.

    Args:
        drift: D [m, n], float32 or float64.
        up: [m, r].
        down: [r, n].
        rates: ρ of the left and of the right side.
        rounds: at most.
    """
    (left, of_up), (right, of_down) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    weight = (of_up @ of_down.mT).double()
    size = float(torch.linalg.matrix_norm(weight))
    if size == 0 or max(rates) == 0:
        return up, down
    krylov = _Krylov.begin(drift, left, right, rounds)
    chain = _Chain.begin(up.shape[1], rates, weight / size)
    errors: list[float] = []
    for taken in range(1, rounds + 1):
        chain.eliminate(*krylov.expand())
        errors.append(chain.estimate_error())
        if errors[-1] <= GOAL:
            pairs = [
                (krylov.left[: krylov.size].mT @ c, krylov.right[: krylov.size].mT @ y)
                for c, y in chain.solve(drift.dtype)
            ]
            if _measure_residual(drift, (left, right), pairs, chain) <= ALLOWED:
                return pairs[0][0] @ of_up, (pairs[1][1] @ of_down).mT
        elif not _ends_in_time(errors, rounds - taken):
            return None
    return None


def _ends_in_time(errors: list[float], left: int) -> bool:
    """Whether it gets to GOAL in the rounds that are left, at the speed of the last two."""
    error = errors[-1]
    if len(errors) < FIRST_JUDGED:
        return math.isfinite(error)
    before = errors[-3]
    return error < before and 2 * math.log(error / GOAL) <= left * math.log(before / error)


@dataclass
class _Krylov:
    """Orthonormal bases of both sides, as rows, that grow by blocks of r.

    Attributes:
        drift: D [m, n].
        left: [p, m], the first `size` rows of which are in use.
        right: [p, n].
        size: of either basis.
        width: r.
    """

    drift: Tensor
    left: Tensor
    right: Tensor
    size: int
    width: int

    @classmethod
    def begin(cls, drift: Tensor, left: Tensor, right: Tensor, rounds: int) -> _Krylov:
        """The bases of the columns of left [m, r] and right [n, r], with room for the rounds."""
        width = left.shape[1]
        bases = [drift.new_empty((rounds + 1) * width, len(x)) for x in (left, right)]
        for basis, start in zip(bases, (left, right), strict=True):
            basis[:width] = start.mT
        return cls(drift, bases[0], bases[1], width, width)

    def expand(self) -> tuple[Tensor, Tensor, Tensor]:
        """A round: a block more on each side.

        Returns:
            Blocks [r, r] of D in these bases: that of the last blocks, that of the new left and the
            last right one, and that of the last left and the new right one.
        """
        last = slice(self.size - self.width, self.size)
        of_right = self.right[last] @ self.drift.mT
        of_left = self.left[last] @ self.drift
        inner, below = self._append(self.left, of_right)
        _, beside = self._append(self.right, of_left)
        self.size += self.width
        return inner.mT, below, beside.mT

    def _append(self, basis: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Puts what an image [r, …] adds to a basis behind it; its products with the last blocks.

        In exact arithmetic an image meets the last two blocks alone; rounding brings back others.
        """
        size, width = self.size, self.width
        known = basis[:size]
        inner = image @ known.mT
        rest = torch.addmm(image, inner, known, alpha=-1)
        columns, factor = torch.linalg.qr(rest.mT)
        length = float(torch.linalg.vector_norm(image))
        # Of what is nearly nothing rounding decides the direction.
        if not float(factor.diagonal().abs().min()) > CANCELLED * length / math.sqrt(width):
            columns = torch.linalg.qr(columns - known.mT @ (known @ columns))[0]
            factor = (rest @ columns).mT
        basis[size : size + width] = columns.mT
        return inner[:, -width:], factor


@dataclass
class _Chain:
    """[I √ρK; −√ρKᵀ I] of a block tridiagonal K, eliminated block by block, for both ρ at once.

    Its first half of columns solves (I + ρKKᵀ)c = e, its second (I + ρKᵀK)c = e. Every block that
    the elimination leaves has a symmetric part of I or more, so that no pivot is small.

    Attributes:
        roots: √ρ of both sides, [2, 1, 1].
        weights: of the columns, [2, r, r].
        right: the right-hand sides as eliminated, each [2, 2r, r].
        inverses: of the blocks on the diagonal as eliminated, each [2, 2r, 2r].
        couplings: of each block and the one before, [2, 2r, 2r].
        last: the last block of the solutions, [2, 2r, r].
    """

    roots: Tensor
    weights: Tensor
    right: list[Tensor]
    inverses: list[Tensor]
    couplings: list[Tensor]
    last: Tensor

    @classmethod
    def begin(cls, width: int, rates: tuple[float, float], weight: Tensor) -> _Chain:
        """With the first block of each side as right-hand side."""
        roots = torch.tensor(rates, dtype=weight.dtype, device=weight.device).sqrt()
        start = torch.eye(2 * width, dtype=weight.dtype, device=weight.device)
        start = start.reshape(2 * width, 2, width).transpose(0, 1)
        weights = torch.stack([weight, weight.mT])
        return cls(roots[:, None, None], weights, [start], [], [], start)

    def eliminate(self, inner: Tensor, below: Tensor, beside: Tensor) -> None:
        """Takes the three blocks of K that a round gives; the block behind them counts as zero."""
        coupling = self._couple(below, beside)
        pivot = self._couple(inner, inner)
        pivot.diagonal(dim1=-2, dim2=-1).add_(1)
        if self.couplings:
            before = self.couplings[-1]
            pivot += before @ self.inverses[-1] @ before.mT
        inverse = torch.linalg.inv(pivot)
        step = coupling @ inverse
        self.right.append(-(step @ self.right[-1]))
        self.inverses.append(inverse)
        self.couplings.append(coupling)
        end = step @ coupling.mT
        end.diagonal(dim1=-2, dim2=-1).add_(1)
        self.last = torch.linalg.solve(end, self.right[-1])

    def _couple(self, upper: Tensor, lower: Tensor) -> Tensor:
        """√ρ [0 upper; −lowerᵀ 0] for both sides."""
        width = len(upper)
        whole = self.weights.new_zeros(2, 2 * width, 2 * width)
        whole[:, :width, width:] = self.roots * upper.double()
        whole[:, width:, :width] = -self.roots * lower.mT.double()
        return whole

    def estimate_error(self) -> float:
        """What a further block, coupled like the last one, would add to the weighted solutions."""
        return float(torch.linalg.vector_norm(self.couplings[-1] @ self.last @ self.weights))

    def solve(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """The c and y of c + √ρKy = e, y = √ρKᵀc, and of c = −√ρKy, y − √ρKᵀc = e; [p, r] each."""
        blocks = [self.last]
        for right, inverse, coupling in zip(
            self.right[-2::-1], self.inverses[::-1], self.couplings[::-1], strict=True
        ):
            blocks.append(inverse @ (right + coupling.mT @ blocks[-1]))
        width = self.last.shape[-1]
        stacked = torch.stack(blocks[::-1], 1).to(dtype)  # [2, s, 2r, r]
        return [(one[:, :width].flatten(0, 1), one[:, width:].flatten(0, 1)) for one in stacked]


def _measure_residual(
    drift: Tensor, start: tuple[Tensor, Tensor], pairs: list[tuple[Tensor, Tensor]], chain: _Chain
) -> float:
    """What is left of [I √ρD; −√ρDᵀ I][x; y] = e, weighted; by random combinations of columns.

    Of both sides together, as a bound on the errors of x of the left and y of the right side: the
    inverse of this operator shortens every vector.
    """
    total = 0.0
    for side, (x, y) in enumerate(pairs):
        root, weight = float(chain.roots[side]), chain.weights[side]
        mixed = (weight @ _random_probes(len(weight), weight.dtype)).to(drift.dtype)
        # As rows, which a narrow product with a large matrix is faster for.
        x, y, given = ((part @ mixed).mT for part in (x, y, start[side]))
        of_x = x + root * (y @ drift.mT) - (0 if side else given)
        of_y = y - root * (x @ drift) - (given if side else 0)
        total += math.hypot(*(float(torch.linalg.vector_norm(part)) for part in (of_x, of_y)))
    return total / math.sqrt(PROBES)


@cache
def _random_probes(count: int, dtype: torch.dtype) -> Tensor:
    """Normal columns [count, PROBES], the same in every call."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(count, PROBES, generator=generator, dtype=dtype, device="cpu")
