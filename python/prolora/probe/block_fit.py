"""The updates of one block that bring its output closest to what is wanted: least squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.lowrank import LowRank
from .trajectories import Call, weight_of

Weights = dict[str, Tensor]
Read = Callable[[Any], tuple[Tensor, ...]]

_STEP = 1e-3  # of the weights' norm: float32 keeps four digits of a derivative by differences


@dataclass(frozen=True)
class BlockProblem:
    """min over D of Σ ‖f(W + D) − wanted‖² + ridge, linearised at the module's weights W.

    Attributes:
        module: the block, or the model that ends in the prediction.
        names: the linear modules inside whose weights may change.
        calls: the inputs of `module`, one batch each.
        wanted: for each call, what each output should be.
        read: a return value of `module` -> the tensors that `wanted` speaks of.
        ridge: λ of the penalty, relative to the mean diagonal of the curvature.
        iterations: conjugate-gradient steps; few steps regularise as well.
    """

    module: nn.Module
    names: Sequence[str]
    calls: Sequence[Call]
    wanted: Sequence[tuple[Tensor, ...]]
    read: Read
    ridge: float
    iterations: int

    def outputs(self, call: Call, weights: Weights) -> tuple[Tensor, ...]:
        """The outputs with other weights in place."""
        state = {f"{name}.weight": weight for name, weight in weights.items()}
        return self.read(functional_call(self.module, state, call.args, call.kwargs))

    def weights(self) -> Weights:
        """The weights at which the problem is linearised."""
        return {name: weight_of(self.module, name).detach().float() for name in self.names}


class BlockCurvature:
    """A Kronecker-factored estimate of JᵀJ, as preconditioner and scale of the ridge.

    For each module, JᵀJ ≈ diag(s) ⊗ G: G = Σ x xᵀ over the tokens x it reads, s how strongly each
    of its outputs acts on the block's, from one random back-projection.
    """

    def __init__(self, grams: Weights, back: Weights, ridge: float) -> None:
        """From G [n, n] and back-projections [m, n], by module."""
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        for name, gram in grams.items():
            values, vectors = torch.linalg.eigh(gram)
            values = values.clamp_min(0)
            scale = back[name].double().square().sum(1) / values.sum().clamp_min(1e-30)
            scale = scale.clamp_min(0.1 * scale.mean()).clamp_min(1e-30)
            penalty = (ridge * values.mean() * scale.mean()).clamp_min(1e-30)
            self.parts[name] = (values, vectors, scale, penalty)

    def solve(self, right: Weights) -> Weights:
        """(diag(s) ⊗ G + λ)⁻¹ right."""
        return {
            name: ((r.double() @ self.parts[name][1]) / self._spectrum(name))
            @ self.parts[name][1].mT
            for name, r in right.items()
        }

    def _spectrum(self, name: str) -> Tensor:
        values, _, scale, penalty = self.parts[name]
        return scale[:, None] * values + penalty

    def penalised(self, product: Weights, at: Weights) -> Weights:
        """The product with the penalty: product + λ·at."""
        return {n: p.double() + self.parts[n][3] * at[n] for n, p in product.items()}


def fit_block(problem: BlockProblem) -> tuple[Weights, Weights]:
    """Solves the linearised problem by preconditioned conjugate gradients.

    No graph outlives one call: J·D is a difference of two forward passes and Jᵀ·y one backward
    pass through `module`, recomputed for every call, so memory is that of one batch.

    Returns:
        The updates D [m, n] in float64 by module, and the Gram matrices [n, n] of what each module
        reads, for the cut to low rank.
    """
    start = problem.weights()
    grams, back, right, base = _survey_block(problem, start)
    curvature = BlockCurvature(grams, back, problem.ridge)
    solution = {name: torch.zeros_like(r) for name, r in right.items()}
    rest = right
    step = curvature.solve(rest)
    direction, power = step, _inner_product(rest, step)
    for _ in range(problem.iterations):
        if power <= 0:
            break  # nothing is missing
        curved = curvature.penalised(_normal_product(problem, start, base, direction), direction)
        length = power / _inner_product(direction, curved)
        solution = _add_scaled(solution, length, direction)
        rest = _add_scaled(rest, -length, curved)
        step = curvature.solve(rest)
        before, power = power, _inner_product(rest, step)
        direction = _add_scaled(step, power / before, direction)
    return solution, grams


def _survey_block(
    problem: BlockProblem, start: Weights
) -> tuple[Weights, Weights, Weights, list[tuple[Tensor, ...]]]:
    """One pass: Gram matrices, random back-projections, Jᵀ·missing, and the outputs at W."""
    generator = torch.Generator().manual_seed(0)
    grams: Weights = {}
    base: list[tuple[Tensor, ...]] = []

    def gram(name: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2).double()
        grams[name] = grams.get(name, torch.zeros(())).to(flat) + flat.mT @ flat

    hooks = [
        problem.module.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: gram(name, args[0])
        )
        for name in problem.names
    ]
    back = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in start.items()}
    right = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in start.items()}
    try:
        for call, wanted in zip(problem.calls, problem.wanted, strict=True):
            leaves = {name: w.clone().requires_grad_() for name, w in start.items()}
            with torch.enable_grad():
                outputs = problem.outputs(call, leaves)
            noise = tuple(torch.randn(o.shape, generator=generator).to(o) for o in outputs)
            missing = tuple((w - o).detach() for w, o in zip(wanted, outputs, strict=True))
            _add_pullback(outputs, noise, leaves, back, keep=True)
            _add_pullback(outputs, missing, leaves, right)
            base.append(tuple(o.detach() for o in outputs))
    finally:
        for hook in hooks:
            hook.remove()
    return grams, back, right, base


def _add_pullback(
    outputs: tuple[Tensor, ...],
    along: tuple[Tensor, ...],
    leaves: Weights,
    into: Weights,
    keep: bool = False,
) -> None:
    """Adds Jᵀ·along."""
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), along, retain_graph=keep, allow_unused=True
    )
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            into[name] += gradient


def _normal_product(
    problem: BlockProblem, start: Weights, base: list[tuple[Tensor, ...]], direction: Weights
) -> Weights:
    """JᵀJ·direction, summed over the calls."""
    size = _inner_product(start, start).sqrt() / _inner_product(
        direction, direction
    ).sqrt().clamp_min(1e-30)
    step = float(_STEP * size)
    moved = {name: (w + step * direction[name]).to(w.dtype) for name, w in start.items()}
    product = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in start.items()}
    for call, before in zip(problem.calls, base, strict=True):
        with torch.no_grad():
            after = problem.outputs(call, moved)
        slope = tuple((a - b) / step for a, b in zip(after, before, strict=True))
        leaves = {name: w.clone().requires_grad_() for name, w in start.items()}
        with torch.enable_grad():
            outputs = problem.outputs(call, leaves)
        _add_pullback(outputs, slope, leaves, product)
    return product


def _inner_product(a: Weights, b: Weights) -> Tensor:
    return torch.stack([(a[name].double() * b[name].double()).sum() for name in a]).sum()


def _add_scaled(a: Weights, factor: Tensor, b: Weights) -> Weights:
    return {name: a[name] + factor * b[name] for name in a}


def rank_for(values: Tensor, rank: float) -> int:
    """How many singular values to keep: that many, or as many as hold that share (below 1)."""
    if rank >= 1:
        return min(int(rank), len(values))
    squares = values.double().square()
    held = squares.cumsum(0) / squares.sum().clamp_min(1e-300)
    return min(int((held < rank).sum()) + 1, len(values))


def cut_by_gram(update: Tensor, gram: Tensor, rank: float) -> LowRank:
    """The low-rank update whose outputs on the probes are closest to those of `update`.

    Args:
        update: D [m, n].
        gram: G [n, n], Σ x xᵀ over what the module reads.
        rank: of the result; see `rank_for`.

    Returns:
        The r leading singular triplets of D·G^½, times G^(−½): reduced-rank regression.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0) + 1e-3 * values.mean().clamp_min(1e-30)
    root = (vectors * values.sqrt()) @ vectors.mT
    back = (vectors / values.sqrt()) @ vectors.mT
    left, kept, right = torch.linalg.svd(update @ root, full_matrices=False)
    count = rank_for(kept, rank)
    size = kept[:count].sqrt()
    return LowRank((left[:, :count] * size).float(), (size[:, None] * right[:count] @ back).float())
