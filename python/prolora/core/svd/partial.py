"""Leading eigenpairs of one symmetric matrix, by the ops of `ops.tridiagonal`.

A dense solver computes all eigenvectors, which takes two thirds of its time. Here the values come
first, then as many vectors as are wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import native
from ..ops.tridiagonal import tridiagonal_values, tridiagonal_vectors, tridiagonalise
from .solvers import FEW_PROBES, SKEW_32, descending_eigh, random_probes
from .stacks import is_on_host
from .tuning import TUNING

# Values closer to each other than this share of the largest may have vectors that are not
# orthogonal: a dense solver has to separate them.
SEPARATE = 1e-12


@dataclass(frozen=True)
class Reduced:
    """A symmetric matrix [1, d, d] as Q T Qᵀ."""

    symmetric: Tensor
    reflections: Tensor
    scales: Tensor
    diagonal: Tensor
    beside: Tensor

    @classmethod
    def of(cls, symmetric: Tensor) -> Reduced:
        """Reduces a matrix whose triangles are both filled."""
        return cls(symmetric, *tridiagonalise(symmetric))

    def values(self, count: int) -> Tensor:
        """Returns the largest eigenvalues [1, count], float64, descending."""
        return tridiagonal_values(self.diagonal, self.beside, count)

    def rows(self, values: Tensor) -> Tensor | None:
        """Returns unit eigenvectors [1, count, d] of the largest eigenvalues.

        None where they are not orthonormal, or do not belong to the matrix: judged by random
        combinations, as a dense solver's are.
        """
        if not bool((values.diff() < -SEPARATE * values[0, 0].abs()).all()):
            return None
        rows = tridiagonal_vectors(self.diagonal, self.beside, values)[0].to(self.scales.dtype)
        if rows.shape[1] > 1:
            reflections, scales = self.reflections[0, :-1, 1:].mT, self.scales[0, :-1]
            rows[:, 1:] = torch.ormqr(reflections, scales, rows[:, 1:].mT).mT
        return rows[None] if self._accepts(rows, values[0].to(rows.dtype)) else None

    def _accepts(self, rows: Tensor, values: Tensor) -> bool:
        """Returns whether the rows are orthonormal and belong to the matrix."""
        probes = random_probes(len(values), FEW_PROBES, rows.dtype, rows.device)
        both = torch.cat([probes, values[:, None] * probes], 1)
        mixed, scaled = (rows.mT @ both).chunk(2, 1)
        skew = torch.linalg.vector_norm(rows @ mixed - probes)
        left = torch.linalg.vector_norm(self.symmetric[0] @ mixed - scaled)
        allowed = SKEW_32 * math.sqrt(FEW_PROBES) / 2
        norm = torch.linalg.vector_norm(self.symmetric)
        return bool((skew <= allowed) & (left <= allowed * norm))


def leading_eigh(lower: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns `count` leading eigenvalues and eigenvectors as columns [b, d, p], or all.

    As `descending_eigh`, which takes over where that pays or values lie too close.
    """
    if solves_partially(lower) and count <= TUNING.eigensolver_share * lower.shape[1]:
        reduced = Reduced.of(torch.tril(lower) + torch.tril(lower, -1).mT)
        values = reduced.values(count)
        rows = reduced.rows(values)
        if rows is not None:
            return values, rows.mT
    return descending_eigh(lower)


def solves_partially(matrix: Tensor) -> bool:
    """Returns whether the extension finds leading eigenpairs of a stack like this one."""
    alone = is_on_host(matrix) and len(matrix) == 1
    return alone and native.EXTENSION.kernels is not None
