"""The target's prediction as a function of a LoRA, and its linearisation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import ProLoRAError
from ..sides import Call, Read
from ..updates import Factors, input_of, place_factors, read_rows, temporary_hooks, written_rows
from .spectra import JointCurvature

MAX_MOMENTUM = 0.9
"""Largest multiple of the last step: it was computed on other probes."""


@dataclass(frozen=True)
class ProbeBatch:
    """One batch of inputs with its predictions."""

    call: Call  # inputs of the target
    plain: Tensor  # what it predicts there without updates
    wanted: Tensor  # what it should predict


@dataclass(frozen=True)
class Linearisation:
    """The target linearised at some LoRA, on the probes of one step."""

    probes: Sequence[ProbeBatch]  # the batches
    factors: Factors  # where
    base: list[Tensor]  # the prediction of every batch there
    gradient: Factors  # of both factors, Jᵀ·missing with missing = wanted − base
    missing: float  # ‖missing‖²
    reached: float  # share of the wanted change that is reached there


@contextlib.contextmanager
def recompute_blocks(model: nn.Module) -> Iterator[None]:
    """Lets blocks run again in the backward pass, if the model can.

    Models of diffusers can. Then only what is between blocks is kept of a forward pass, and of
    weights in half precision only one block's are in float32 at a time.
    """
    any_model: Any = model
    can = getattr(model, "_supports_gradient_checkpointing", False)
    switch = can and not any_model.is_gradient_checkpointing
    if switch:
        any_model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if switch:
            any_model.disable_gradient_checkpointing()


class TargetFunction:
    """The prediction of the target as a function of the LoRA.

    The LoRA stands beside its weights.

    Attributes:
        curvature: the estimate of JᵀJ on the probes seen so far.
        generator: of the random numbers that estimate it.
    """

    def __init__(self, target: nn.Module, read: Read, damping: float) -> None:
        """Takes the model, how its prediction is read, and `damping` of JᵀJ."""
        self.target, self.read = target, read
        self.generator = torch.Generator().manual_seed(0)
        self.curvature = JointCurvature(damping, self.generator)

    def predict_along(self, call: Call, factors: Factors, line: Factors, length: float) -> Tensor:
        """Predicts some way along a line; a module's factors move there when it runs."""

        def move(name: str) -> tuple[Tensor, Tensor]:
            (up, down), (by_up, by_down) = factors[name], line[name]  # the line in 16 or 32 bits
            return up + length * by_up.float(), down + length * by_down.float()

        with place_factors(self.target, factors, move):
            return self.read(self.target(*call.args, **call.kwargs))

    def linearise(
        self, probes: Sequence[ProbeBatch], factors: Factors, renew: bool
    ) -> Linearisation:
        """Predictions and gradients of the factors; `renew` adds the probes to the curvature."""
        gradient = {n: (torch.zeros_like(b), torch.zeros_like(a)) for n, (b, a) in factors.items()}
        base, left, total = [], 0.0, 0.0
        if renew:
            self.curvature.fade()
        with recompute_blocks(self.target):
            for probe in probes:
                prediction, missing = self._add_gradient(probe, factors, gradient, renew)
                base.append(prediction)
                left += float(missing.double().square().sum())
                total += float((probe.wanted - probe.plain).double().square().sum())
        reached = 1 - left / total if total else float(not left)
        return Linearisation(probes, factors, base, gradient, left, reached)

    def _add_gradient(
        self, probe: ProbeBatch, factors: Factors, gradient: Factors, renew: bool
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradients of one batch; returns its prediction and what is missing from it."""
        leaves = {
            name: (up.detach().requires_grad_(), down.detach().requires_grad_())
            for name, (up, down) in factors.items()
        }
        values = [factor for pair in leaves.values() for factor in pair]
        sums = [factor for pair in gradient.values() for factor in pair]
        with torch.enable_grad(), place_factors(self.target, leaves):  # also when blocks run again
            with self._record_factors(leaves if renew else {}) as output_hooks:
                prediction = self.read(self.target(*probe.call.args, **probe.call.kwargs))
            if not prediction.requires_grad:
                raise ProLoRAError(
                    f"{type(self.target).__name__}'s prediction depends on none of "
                    f"{', '.join(factors)}: a fit needs modules whose output reaches it"
                )
            if renew:
                noise = torch.randn(prediction.shape, generator=self.generator).to(prediction)
                ups = values[::2]
                torch.autograd.grad(prediction, ups, noise, retain_graph=True, allow_unused=True)
                for hook in output_hooks:
                    hook.remove()
            missing = (probe.wanted - prediction).detach()
            parts = torch.autograd.grad(prediction, values, missing, allow_unused=True)
        for total, part in zip(sums, parts, strict=True):
            if part is not None:
                total += part
        return prediction.detach(), missing

    @contextlib.contextmanager
    def _record_factors(self, names: Mapping[str, Any]) -> Iterator[list[RemovableHandle]]:
        """Adds the modules' inputs and their outputs' gradients to the curvature."""
        output_hooks: list[RemovableHandle] = []

        def record(name: str, x: Tensor, y: Tensor) -> None:
            module = self.target.get_submodule(name)
            self.curvature.add_reads(name, read_rows(module, x.detach()))

            def seen(g: Tensor) -> None:
                self.curvature.add_writes(name, written_rows(module, g))

            output_hooks.append(y.register_hook(seen))

        module_hooks = (
            self.target.get_submodule(name).register_forward_hook(
                lambda _module, args, kwargs, y, name=name: record(name, input_of(args, kwargs), y),
                with_kwargs=True,
            )
            for name in names
        )
        with temporary_hooks(module_hooks):
            yield output_hooks

    @torch.no_grad()
    def solve_lengths(
        self, point: Linearisation, lines: list[Factors], trial: list[float]
    ) -> list[float]:
        """Finds the lengths c ≥ 0 that minimise ‖missing − Σ cᵢ·J·lineᵢ‖.

        `lines` are a direction, and the last step; `trial` the lengths over which J·lineᵢ is taken
        as a difference of predictions. The last step's length is at most MAX_MOMENTUM.
        """
        size = len(lines)
        right = torch.zeros(size, dtype=torch.float64)
        curved = torch.zeros(size, size, dtype=torch.float64)
        for probe, base in zip(point.probes, point.base, strict=True):
            slopes = [
                ((self.predict_along(probe.call, point.factors, *one) - base) / one[1]).double()
                for one in zip(lines, trial, strict=False)
            ]
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
