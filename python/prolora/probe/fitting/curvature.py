"""JᵀJ of linear modules as Kronecker products (K-FAC), estimated on the probes.

J is the derivative of the outputs with respect to the weights. For y = W·x inside the model, JᵀJ
is close to a product of two factors: one of what the module reads, Σ x xᵀ, and one of what reaches
y when random numbers are propagated back from the outputs. The joint fit inverts two full factors.
The fit of one block needs the exact inverse with a ridge penalty, and so a diagonal second factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import SolverFailure
from .low_rank import multiply_factors

Weights = dict[str, Tensor]
"""Tensors by module name."""

MAX_FACTOR = 4096
"""Wider factors are diagonal in the joint fit: a full one would cost more than the model."""

_ROUNDING = 1e-7
"""Of the largest module's Σ g gᵀ: squares of gradients that are little but rounding."""

_FADE = 0.9  # of the factors, when new probes are added: the weights move


def add_outer_products(sums: Weights, name: str, rows: Tensor) -> None:
    """Adds Σ r rᵀ [n, n] over rows [..., n] to a sum; in float64 where the rows are."""
    flat = rows.detach().flatten(0, -2)
    product = flat.mT @ flat
    sums[name] = sums[name] + product if name in sums else product


def _diagonal(factor: Tensor) -> Tensor:
    """Of a factor [n, n], or of one that is kept as its diagonal [n]."""
    return factor if factor.dim() == 1 else factor.diagonal()


class JointCurvature:
    """JᵀJ ≈ (Σ g gᵀ) ⊗ (Σ x xᵀ) / tokens, module by module.

    x is what the module reads, g what reaches its output. Both factors are damped by
    √damping · (mean diagonal) before they are inverted, that of g by _ROUNDING of the largest
    module's at least: a module that acts by rounding alone would outweigh all others.

    Attributes:
        damping: relative to the mean diagonal.
        reads: module -> Σ x xᵀ [n, n], or its diagonal [n] above MAX_FACTOR.
        writes: module -> Σ g gᵀ [m, m], or its diagonal [m].
        tokens: module -> how many x were added.
        inverse: module -> the inverses of both damped factors, as of the last `invert`.
    """

    def __init__(self, damping: float) -> None:
        """Starts with no probes."""
        self.damping = damping
        self.reads: Weights = {}
        self.writes: Weights = {}
        self.tokens: dict[str, float] = {}
        self.inverse: dict[str, tuple[Tensor, Tensor]] = {}

    def fade(self) -> None:
        """Lets what was added so far count less."""
        for sums in (self.reads, self.writes):
            for name in sums:
                sums[name] *= _FADE
        self.tokens = {name: _FADE * count for name, count in self.tokens.items()}

    def add_reads(self, name: str, x: Tensor) -> None:
        """Adds what a module reads, x [..., n]."""
        self._add(self.reads, name, x)
        self.tokens[name] = self.tokens.get(name, 0.0) + x[..., 0].numel()

    def add_writes(self, name: str, g: Tensor) -> None:
        """Adds what reaches the output of a module, g [..., m]."""
        self._add(self.writes, name, g)

    def _add(self, sums: Weights, name: str, rows: Tensor) -> None:
        if rows.shape[-1] <= MAX_FACTOR:
            add_outer_products(sums, name, rows.float())
        else:
            squares = rows.detach().flatten(0, -2).float().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

    def invert(self) -> None:
        """Inverts the factors as they are now.

        Raises:
            SolverFailure: those of a module are not finite; the message names it.
        """
        means = [_diagonal(writes).mean() for writes in self.writes.values()]
        largest = float(torch.stack(means).max()) if means else 0.0
        for name, writes in self.writes.items():  # none where nothing reaches the prediction
            inverse = self._invert(name, writes, _ROUNDING * largest)
            self.inverse[name] = (inverse, self._invert(name, self.reads[name]))

    def _invert(self, name: str, factor: Tensor, least: float = 0.0) -> Tensor:
        """(F + √damping·mean(diag F)·I)⁻¹ of a factor [n, n] or of a diagonal [n].

        The term of I is at least `least`; `name` is that of the module.
        """
        shift = (self.damping**0.5 * _diagonal(factor).mean()).clamp_min(max(least, 1e-30))
        if factor.dim() == 1:
            return torch.reciprocal(factor + shift)
        shifted = factor + shift * torch.eye(len(factor), device=factor.device)
        root, failed = torch.linalg.cholesky_ex(shifted)
        if bool(failed):
            raise SolverFailure(
                f"{name} of the target: what it reads or what reaches its output is NaN, or too "
                "large for float32; the target cannot be fitted with these weights"
            )
        return torch.cholesky_inverse(root)

    def solve(self, gradient: Weights) -> Weights:
        """(JᵀJ)⁻¹ gradient, module by module [m, n]; 0 where nothing reaches the prediction."""
        return {
            name: multiply_factors(self.inverse[name][0], g, self.inverse[name][1])
            * self.tokens[name]
            if name in self.inverse
            else torch.zeros_like(g)
            for name, g in gradient.items()
        }


class BlockCurvature:
    """JᵀJ ≈ diag(s) ⊗ G with a ridge penalty λ, module by module: preconditioner of one block.

    G = Σ x xᵀ over the tokens x that the module reads; s says how strongly each of its outputs
    acts on those of the block, from one random back-projection.
    """

    def __init__(self, grams: Weights, back: Weights, ridge: float) -> None:
        """Takes G [n, n] and back-projections [m, n] by module; λ relative to the mean diagonal."""
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        for name, gram in grams.items():
            values, vectors = torch.linalg.eigh(gram)
            values = values.clamp_min(0)
            scale = back[name].double().square().sum(1) / values.sum().clamp_min(1e-30)
            scale = scale.clamp_min(0.1 * scale.mean()).clamp_min(1e-30)
            penalty = (ridge * values.mean() * scale.mean()).clamp_min(1e-30)
            self.parts[name] = (values, vectors, scale, penalty)

    def solve(self, right: Weights) -> Weights:
        """(diag(s) ⊗ G + λ)⁻¹ right, module by module [m, n]."""
        return {name: self._solve(name, r.double()) for name, r in right.items()}

    def _solve(self, name: str, right: Tensor) -> Tensor:
        values, vectors, scale, penalty = self.parts[name]
        return (right @ vectors) / (scale[:, None] * values + penalty) @ vectors.mT

    def add_penalty(self, product: Weights, at: Weights) -> Weights:
        """The product with the penalty: product + λ·at."""
        return {name: p + self.parts[name][3] * at[name] for name, p in product.items()}
