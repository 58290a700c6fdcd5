"""The updates of one block that bring its output closest to what is wanted: least squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..hooks import keep_hooks
from ..recording.trajectories import Call
from ..updates import weight_of
from .curvature import BlockCurvature, Weights, add_outer_products

Outputs = tuple[Tensor, ...]
"""What is compared with the wanted tensors of one call."""

_STEP = 1e-3  # of the weights' norm: float32 keeps four digits of a derivative by differences


@dataclass(frozen=True)
class BlockProblem:
    """min over D of Σ ‖f(W + D) − wanted‖² + ridge, linearised at the module's weights W.

    Attributes:
        module: the block, or the model that ends in the prediction.
        names: the linear modules inside whose weights may change.
        calls: the inputs of `module`, one batch each.
        wanted: for each call, what each output should be.
        read: a return value of `module` -> the tensors that are compared with `wanted`.
        ridge: λ of the penalty, relative to the mean diagonal of the curvature.
        iterations: conjugate-gradient steps; few steps regularise as well.
    """

    module: nn.Module
    names: Sequence[str]
    calls: Sequence[Call]
    wanted: Sequence[Outputs]
    read: Callable[[Any], Outputs]
    ridge: float
    iterations: int

    def outputs(self, call: Call, weights: Weights) -> Outputs:
        """The outputs with other weights in place."""
        state = {f"{name}.weight": weight for name, weight in weights.items()}
        return self.read(functional_call(self.module, state, call.args, call.kwargs))

    def weights(self) -> Weights:
        """The weights at which the problem is linearised."""
        return {name: weight_of(self.module, name).detach().float() for name in self.names}


def fit_block(problem: BlockProblem) -> tuple[Weights, Weights]:
    """Solves the linearised problem by preconditioned conjugate gradients.

    No graph outlives one call: J·D is a difference of two forward passes and Jᵀ·y one backward
    pass through `module`, recomputed for every call, so memory is that of one batch.

    Returns:
        The dense updates D, and the Gram matrices of what each module reads, by name.
    """
    start = problem.weights()
    survey = _survey_block(problem, start)
    curvature = BlockCurvature(survey.grams, survey.back, problem.ridge)
    solution = {name: torch.zeros_like(r) for name, r in survey.right.items()}
    rest = survey.right
    step = curvature.solve(rest)
    direction, power = step, _inner_product(rest, step)
    for _ in range(problem.iterations):
        if power <= 0:
            break  # nothing is missing
        product = _normal_product(problem, start, survey.base, direction)
        curved = curvature.add_penalty(product, direction)
        length = power / _inner_product(direction, curved)
        solution = _add_scaled(solution, length, direction)
        rest = _add_scaled(rest, -length, curved)
        step = curvature.solve(rest)
        before, power = power, _inner_product(rest, step)
        direction = _add_scaled(step, power / before, direction)
    return solution, survey.grams


@dataclass(frozen=True)
class _Survey:
    """What one pass over the calls gives, by module.

    Attributes:
        grams: G = Σ x xᵀ [n, n] of what a module reads.
        back: random numbers at the outputs, propagated back to the weights [m, n].
        right: Jᵀ·missing [m, n].
        base: the outputs of every call at W.
    """

    grams: Weights
    back: Weights
    right: Weights
    base: list[Outputs]


def _survey_block(problem: BlockProblem, start: Weights) -> _Survey:
    """One pass over the calls at the weights W."""
    generator = torch.Generator().manual_seed(0)
    back = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in start.items()}
    right = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in start.items()}
    survey = _Survey({}, back, right, [])
    hooks = (
        problem.module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: add_outer_products(survey.grams, name, args[0].double())
        )
        for name in problem.names
    )
    with keep_hooks(hooks):
        for call, wanted in zip(problem.calls, problem.wanted, strict=True):
            leaves = {name: w.clone().requires_grad_() for name, w in start.items()}
            with torch.enable_grad():
                outputs = problem.outputs(call, leaves)
            noise = tuple(torch.randn(o.shape, generator=generator).to(o) for o in outputs)
            missing = tuple((w - o).detach() for w, o in zip(wanted, outputs, strict=True))
            _add_pullback(outputs, noise, leaves, back, retain=True)
            _add_pullback(outputs, missing, leaves, right)
            survey.base.append(tuple(o.detach() for o in outputs))
    return survey


def _add_pullback(
    outputs: Outputs, along: Outputs, leaves: Weights, sums: Weights, retain: bool = False
) -> None:
    """Adds Jᵀ·along to the sums; `retain` keeps the graph for another backward pass."""
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), along, retain_graph=retain, allow_unused=True
    )
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            sums[name] += gradient


def _normal_product(
    problem: BlockProblem, start: Weights, base: list[Outputs], direction: Weights
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
