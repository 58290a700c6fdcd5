"""The target's prediction as a function of the weights of some modules, and its linearisation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from ..hooks import keep_hooks
from ..recording.trajectories import Call
from ..recording.translation import Read
from ..updates import weight_of
from .curvature import JointCurvature, Weights

MAX_MOMENTUM = 0.9
"""Largest multiple of the last step: it was computed on other probes."""


@dataclass(frozen=True)
class ProbeBatch:
    """One batch.

    Attributes:
        call: inputs of the target.
        plain: what it predicts there without updates.
        wanted: what it should predict.
    """

    call: Call
    plain: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Linearisation:
    """The target linearised at some weights, on the probes of one step.

    Attributes:
        probes: the batches.
        weights: where.
        base: the prediction of every batch there.
        gradient: module -> Jᵀ·missing [m, n], missing = wanted − base.
        reached: share of the wanted change that is reached there.
    """

    probes: Sequence[ProbeBatch]
    weights: Weights
    base: list[Tensor]
    gradient: Weights
    reached: float


class TargetFunction:
    """The prediction of the target as a function of the weights W of some of its modules.

    Attributes:
        start: W, as stored in the target, in float32.
        curvature: the estimate of JᵀJ on the probes seen so far.
        generator: of the random numbers that estimate it.
    """

    def __init__(self, target: nn.Module, names: Sequence[str], read: Read, damping: float) -> None:
        """Takes the model, its linear modules whose weights vary, and `damping` of JᵀJ."""
        self.target, self.names, self.read = target, names, read
        self.start = {name: weight_of(target, name).detach().float() for name in names}
        self.curvature = JointCurvature(damping)
        self.generator = torch.Generator().manual_seed(0)

    def predict(self, call: Call, weights: Weights) -> Tensor:
        """The prediction with other weights in place."""
        state = {f"{name}.weight": weight for name, weight in weights.items()}
        return self.read(functional_call(self.target, state, call.args, call.kwargs))

    def linearise(
        self, probes: Sequence[ProbeBatch], weights: Weights, renew: bool
    ) -> Linearisation:
        """Predictions and Jᵀ·missing; `renew` adds the probes to the curvature."""
        gradient = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        base, left, total = [], 0.0, 0.0
        if renew:
            self.curvature.fade()
        for probe in probes:
            prediction, missing = self._add_gradient(probe, weights, gradient, renew)
            base.append(prediction)
            left += float(missing.double().square().sum())
            total += float((probe.wanted - probe.plain).double().square().sum())
        if renew:
            self.curvature.invert()
        reached = 1 - left / total if total else float(not left)
        return Linearisation(probes, weights, base, gradient, reached)

    def _add_gradient(
        self, probe: ProbeBatch, weights: Weights, gradient: Weights, renew: bool
    ) -> tuple[Tensor, Tensor]:
        """Adds Jᵀ·missing of one batch; returns its prediction and what is missing from it."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        values = list(leaves.values())
        with torch.enable_grad(), self._record_factors(renew) as output_hooks:
            prediction = self.predict(probe.call, leaves)
            if renew:
                noise = torch.randn(prediction.shape, generator=self.generator).to(prediction)
                torch.autograd.grad(prediction, values, noise, retain_graph=True, allow_unused=True)
                for hook in output_hooks:
                    hook.remove()
        missing = (probe.wanted - prediction).detach()
        parts = torch.autograd.grad(prediction, values, missing, allow_unused=True)
        for name, part in zip(leaves, parts, strict=True):
            if part is not None:
                gradient[name] += part
        return prediction.detach(), missing

    @contextlib.contextmanager
    def _record_factors(self, renew: bool) -> Iterator[list[RemovableHandle]]:
        """Adds what the modules read, and what reaches their outputs, to the curvature.

        Yields:
            The hooks on the outputs, to be removed before another backward pass.
        """
        output_hooks: list[RemovableHandle] = []

        def record(name: str, x: Tensor, y: Tensor) -> None:
            self.curvature.add_reads(name, x)
            output_hooks.append(y.register_hook(lambda g: self.curvature.add_writes(name, g)))

        module_hooks = (
            self.target.get_submodule(name).register_forward_hook(
                lambda _module, args, y, name=name: record(name, args[0], y)
            )
            for name in (self.names if renew else ())
        )
        with keep_hooks(module_hooks):
            yield output_hooks

    @torch.no_grad()
    def solve_lengths(
        self, point: Linearisation, lines: list[Weights], trial: list[float]
    ) -> list[float]:
        """The lengths c ≥ 0 that minimise ‖missing − Σ cᵢ·J·lineᵢ‖.

        Args:
            point: where the target is linearised.
            lines: one direction, or a direction and the last step.
            trial: the lengths over which J·lineᵢ is taken, as a difference of predictions.

        Returns:
            One length a line; that of the last step is at most MAX_MOMENTUM.
        """
        size = len(lines)
        right = torch.zeros(size, dtype=torch.float64)
        curved = torch.zeros(size, size, dtype=torch.float64)
        for probe, base in zip(point.probes, point.base, strict=True):
            slopes = []
            for line, length in zip(lines, trial, strict=False):
                moved = {n: w + length * line[n] for n, w in point.weights.items()}
                slopes.append(((self.predict(probe.call, moved) - base) / length).double())
            missing = (probe.wanted - base).double()
            for i in range(size):
                right[i] += (slopes[i] * missing).sum().cpu()
                for j in range(size):
                    curved[i, j] += (slopes[i] * slopes[j]).sum().cpu()
        diagonal = curved.diagonal().clamp_min(1e-30)
        if size == 1:
            return [max(float(right[0] / diagonal[0]), 0.0)]
        free = torch.linalg.lstsq(curved, right[:, None]).solution[:, 0]
        momentum = min(max(float(free[1]), 0.0), MAX_MOMENTUM)
        rest = float((right[0] - curved[0, 1] * momentum) / diagonal[0])
        return [max(rest, 0.0), momentum]
