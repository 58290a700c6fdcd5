"""Several updates of one weight as one, and how they relate.

Everything runs on stacked factors and small Gram matrices; nothing of the size of the weight is
formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TypeVar

import torch
from torch import Tensor

from .exceptions import ShapeMismatch
from .lowrank import LowRank
from .precision import in_full_precision
from .recompression import product_svd

Item = TypeVar("Item")

# Columns whose singular value is below this share of the first are rounding.
_ZERO = 1e-6
# Of Lemke's method, on a matrix with the diagonal 1: so little that only equal updates feel it,
# which then share alike; what decides between equal pivots; the least pivot; more than are needed.
_RIDGE, _TIES, _PIVOT, _MOST_PIVOTS = 1e-7, 1e-14, 1e-12, 10_000


def sum_updates(parts: Sequence[LowRank]) -> LowRank:
    """Adds updates [m, n] exactly, Σ ΔW_k: the factors side by side.

    The result has as many columns as all parts together, cut to min(m, n).

    Raises:
        ShapeMismatch: the updates differ in shape.
    """
    _check_shapes(parts)
    if len(parts) == 1:
        return parts[0]
    up = torch.cat([part.up for part in parts], -1)
    down = torch.cat([part.down for part in parts], -2)
    most = min(up.shape[-2], down.shape[-1])
    whole = LowRank(up, down)
    return whole.to(torch.float64).truncate(rank=most).to(up.dtype) if whole.rank > most else whole


def subtract_updates(update: LowRank, other: LowRank) -> LowRank:
    """Returns ΔW − ΔW' [..., m, n], exactly, with the columns of both."""
    up = torch.cat([update.up, -other.up], -1)
    return LowRank(up, torch.cat([update.down, other.down], -2))


def merge_updates(parts: Sequence[LowRank], method: str = "sum") -> LowRank:
    """Merges several updates of one weight [m, n] into one.

    `method` is "sum", or "balanced" for a sum with `balance_updates`' factors.

    Raises:
        ShapeMismatch: the updates differ in shape.
    """
    if method == "balanced":
        factors = balance_updates(parts)
        parts = [LowRank(p.up * f, p.down) for p, f in zip(parts, factors, strict=True)]
    return sum_updates(parts)


def merge_vectors(parts: Sequence[Tensor], method: str = "sum") -> Tensor:
    """Merges several differences of one bias or norm [n] into one.

    `method` is `merge_updates`'. Each counts as a matrix of one column with factors of its own, not
    the factors of the matrix beside it: what one LoRA alone does is kept.
    """
    factors = [1.0] * len(parts)
    if method == "balanced":
        one = torch.ones(1, 1)
        factors = balance_updates([LowRank(part.reshape(-1, 1), one) for part in parts])
    first, *others = (part * factor for part, factor in zip(parts, factors, strict=True))
    return sum(others, first)


def balance_updates(parts: Sequence[LowRank]) -> list[float]:
    """Returns a factor 0 … 1 for each update, so that shared effects count once.

    The smallest update M = Σ a_k ΔW_k that does at least as much along each update as it does
    alone: min ‖M‖ with ⟨M, ΔW_k⟩ ≥ ‖ΔW_k‖². Orthogonal updates keep 1, n equal ones get 1/n.
    Updates that work against each other keep 1 too: a negative product counts as 0.
    """
    gram = torch.tensor([[inner_product(a, b) for b in parts] for a in parts], dtype=torch.float64)
    factors, energies = [1.0] * len(parts), gram.diagonal()
    alive = [i for i, energy in enumerate(energies.tolist()) if energy > 0]
    some = gram[alive][:, alive].clamp_min(0) / energies[alive][:, None]
    some = (some + _RIDGE * torch.eye(len(alive), dtype=torch.float64)) / (1 + _RIDGE)
    for i, factor in zip(alive, _solve_complementary(some), strict=True):
        factors[i] = factor
    return factors


def _solve_complementary(gram: Tensor) -> list[float]:
    """Solves a ≥ 0, Ga ≥ 1, a·(Ga − 1) = 0 by Lemke's method.

    G [n, n] has no negative entry and the diagonal 1, so that the method ends in a solution, and no
    a is above 1.
    """
    n = len(gram)
    if n == 0:
        return []
    one = torch.ones(n, 1, dtype=torch.float64)
    table = torch.cat([torch.eye(n, dtype=torch.float64), -gram, -one, -one], 1)
    table[:, -1] -= _TIES * torch.arange(n)  # equal updates would tie
    basis, entering, row = list(range(n)), 2 * n, n - 1
    for _ in range(_MOST_PIVOTS):
        table[row] /= table[row, entering].clone()
        others = torch.arange(n) != row
        table[others] -= table[others, entering, None] * table[row]
        leaving, basis[row] = basis[row], entering
        if leaving == 2 * n:
            break
        entering = leaving + n if leaving < n else leaving - n
        column = table[:, entering]
        ratios = table[:, -1] / column.clamp_min(_PIVOT)
        row = int(torch.where(column > _PIVOT, ratios, torch.inf).argmin())
    else:
        raise ArithmeticError("the factors of a balanced merge were not found")
    solution = [0.0] * n
    for i, variable in enumerate(basis):
        if n <= variable < 2 * n:
            solution[variable - n] = min(1.0, max(0.0, float(table[i, -1])))
    return solution


@dataclass(frozen=True)
class UpdateOverlap:
    """How updates of one weight relate."""

    products: Tensor  # ⟨ΔW_i, ΔW_j⟩ [k, k], float64
    left: Tensor  # Φ [k, k] of what they write: ‖U_iᵀU_j‖²/min(r_i, r_j); 0 if one is zero
    right: Tensor  # Φ [k, k] of what they read


@in_full_precision
def measure_overlap(parts: Sequence[LowRank]) -> UpdateOverlap:
    """Returns the inner products of updates of one weight and the overlap of their subspaces.

    Raises:
        ShapeMismatch: the updates differ in shape.
    """
    _check_shapes(parts)
    exact = [part.to(torch.float64) for part in parts]
    lefts, rights = zip(*map(_singular_bases, exact), strict=True)
    return UpdateOverlap(
        _tabulate_pairs(exact, inner_product),
        _tabulate_pairs(lefts, _compare_bases),
        _tabulate_pairs(rights, _compare_bases),
    )


def _tabulate_pairs(items: Sequence[Item], measure: Callable[[Item, Item], float]) -> Tensor:
    """Returns a symmetric measure of every two items [k, k]; each pair is measured once."""
    table = [[0.0] * len(items) for _ in items]
    for i, j in combinations_with_replacement(range(len(items)), 2):
        table[i][j] = table[j][i] = measure(items[i], items[j])
    return torch.tensor(table, dtype=torch.float64)


def inner_product(a: LowRank, b: LowRank) -> float:
    """Returns ⟨ΔW_a, ΔW_b⟩ in float64, from small Gram matrices."""
    left, right = a.up.double().mT @ b.up.double(), a.down.double() @ b.down.double().mT
    return (left * right).sum().item()


def _singular_bases(part: LowRank) -> tuple[Tensor, Tensor]:
    """Returns U and V of an update, without columns that are rounding."""
    u, s, v = product_svd(part.up.double(), part.down.double())
    rank = int((s > _ZERO * s[:1]).sum())
    return u[:, :rank], v[:, :rank]


def _compare_bases(a: Tensor, b: Tensor) -> float:
    """Returns Φ of two stacks of orthonormal columns."""
    return ((a.mT @ b).square().sum() / max(1, min(a.shape[1], b.shape[1]))).item()


def _check_shapes(parts: Sequence[LowRank]) -> None:
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) != 1:
        raise ShapeMismatch(f"updates of one weight must have one shape, not {sorted(shapes)}")
