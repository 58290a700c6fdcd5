"""JᵀJ of modules as Kronecker products (K-FAC) of leading spectra.

Estimated on the probes. J is the derivative of the predictions with respect to the weights. For y =
W·x inside the model, JᵀJ is close to S ⊗ R / tokens: R = Σ x xᵀ over what the module reads, S = Σ g
gᵀ over what reaches y when random numbers are propagated back from the prediction. Of both only the
leading eigenvectors and the trace are kept, so that nothing is of the size of the weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.lowrank import LowRank
from ...core.precision import in_full_precision
from ...errors import SolverFailure
from ..updates import Factors

KEPT = 16
"""Eigenvectors of a factor that are kept; the rest counts as a multiple of the identity."""
_ROWS = 256  # rows of one call that are added to a wide factor
_FADE = 0.9  # share of the factors that new probes leave: the weights move
_NOISE = 1e-6  # share of the largest eigenvalue: smaller ones are rounding
_ROUNDING = 1e-7
"""Of the largest module's Σ g gᵀ: squares of gradients that are little but rounding."""
_LOADING_A, _LOADING_B = 1e-6, 1e-3  # shares of the mean diagonals of A·R·Aᵀ and Bᵀ·S·B
CUT_DAMPING = 0.01
"""Of both factors at a cut to lower rank, relative to their mean diagonal."""


class LeadingSpectrum:
    """F = Σ r rᵀ over rows r [d]: its leading eigenvectors, and its trace.

    Attributes:
        basis: √λ·u of the leading eigenvectors u [k, d]; None before any row.
        trace: of F.
        count: of the rows, faded as F is.
    """

    def __init__(self) -> None:
        """Starts with no rows."""
        self.basis: Tensor | None = None
        self.trace = self.count = 0.0

    def fade(self) -> None:
        """Lets what was added so far count less."""
        self.trace, self.count = _FADE * self.trace, _FADE * self.count
        if self.basis is not None:
            self.basis = _FADE**0.5 * self.basis

    @torch.no_grad()
    @in_full_precision  # what a module reads is seen inside the model's autocast
    def add(self, rows: Tensor, generator: torch.Generator) -> None:
        """Adds rows [..., d]; of many long ones a random part stands for all."""
        flat = rows.detach().flatten(0, -2).float()
        size, (count, width) = float(flat.square().sum()), flat.shape
        self.trace, self.count = self.trace + size, self.count + count
        if not math.isfinite(size):
            return  # `damp` refuses it
        if count > _ROWS and width > KEPT + _ROWS:
            picked = torch.randint(count, (_ROWS,), generator=generator).to(flat.device)
            flat = (count / _ROWS) ** 0.5 * flat[picked]
        stack = flat if self.basis is None else torch.cat([self.basis, flat])
        if len(stack) > width:
            values, vectors = torch.linalg.eigh((stack.mT @ stack).double())
            basis = (values.clamp_min(0).sqrt() * vectors).mT.float()
        else:
            values, vectors = torch.linalg.eigh((stack @ stack.mT).double())
            basis = vectors.mT.float() @ stack
        kept = max(int((values > _NOISE * values[-1]).sum()), 1)
        self.basis = basis[-min(KEPT, kept) :].contiguous()

    def damp(self, damping: float, least: float = 0.0) -> DampedSpectrum:
        """Returns F + s·I with s = damping · (mean diagonal), and at least `least`."""
        assert self.basis is not None
        if not math.isfinite(self.trace):
            raise SolverFailure("what it reads or what reaches its output is NaN or too large")
        width = self.basis.shape[1]
        values = self.basis.square().sum(1).clamp_min(1e-30)
        left = max(self.trace - float(values.sum()), 0.0)
        rest = left / max(width - len(values), 1)
        shift = max(damping * self.trace / width, least, 1e-30)
        vectors = self.basis / values.sqrt()[:, None]
        return DampedSpectrum(vectors, values.clamp_min(rest) + shift, rest + shift)


class DampedSpectrum:
    """A positive matrix: some eigenvectors u, and one value elsewhere."""

    def __init__(self, vectors: Tensor, values: Tensor, rest: float) -> None:
        """Takes u [k, d], their eigenvalues [k], and that of all other directions."""
        self.vectors, self.values, self.rest = vectors, values, rest

    def multiply(self, rows: Tensor, power: float) -> Tensor:
        """Rows [..., d] times the matrix to a power."""
        rest = float(self.rest**power)
        leading = (rows @ self.vectors.mT) * (self.values**power - rest)
        return rest * rows + leading @ self.vectors


class JointCurvature:
    """JᵀJ of each module as a Kronecker product of two spectra.

    JᵀJ ≈ (Σ g gᵀ) ⊗ (Σ x xᵀ) / tokens. x is what the module reads, g what reaches its output. Both
    factors are damped by √damping · (mean diagonal) before they are inverted, Σ g gᵀ by _ROUNDING
    of the largest module's at least: a module that acts by rounding alone would outweigh all
    others.

    Attributes:
        damping: relative to the mean diagonal.
        generator: of the rows that stand for all.
        reads: module -> the spectrum of Σ x xᵀ.
        writes: module -> the spectrum of Σ g gᵀ; absent where nothing reaches the prediction.
    """

    def __init__(self, damping: float, generator: torch.Generator) -> None:
        """Starts with no probes."""
        self.damping, self.generator = damping, generator
        self.reads: dict[str, LeadingSpectrum] = {}
        self.writes: dict[str, LeadingSpectrum] = {}

    def fade(self) -> None:
        """Lets what was added so far count less."""
        for spectrum in (*self.reads.values(), *self.writes.values()):
            spectrum.fade()

    def add_reads(self, name: str, x: Tensor) -> None:
        """Adds what a module reads, x [..., n]."""
        self.reads.setdefault(name, LeadingSpectrum()).add(x, self.generator)

    def add_writes(self, name: str, g: Tensor) -> None:
        """Adds what reaches the output of a module, g [..., m]."""
        self.writes.setdefault(name, LeadingSpectrum()).add(g, self.generator)

    def solve(self, factors: Factors, gradient: Factors) -> Factors:
        """Returns the natural step within updates of the rank, module by module.

        Of all changes B·dA + dB·A of an update B·A, it is the one nearest to tokens · S⁻¹·G·R⁻¹ in
        the metric of JᵀJ, G the gradient [m, n], which is never formed:

            dB = tokens · S⁻¹ (G·Aᵀ) (A·R·Aᵀ)⁻¹
            dA = tokens · (Bᵀ·S·B)⁻¹ [(Bᵀ·G)·R⁻¹ − (Bᵀ·G·Aᵀ)(A·R·Aᵀ)⁻¹·A]

        `factors` are (B, A) by module, `gradient` (G·Aᵀ, Bᵀ·G).
        """
        sizes = [s.trace / s.basis.shape[1] for s in self.writes.values() if s.basis is not None]
        least = _ROUNDING * max((size for size in sizes if math.isfinite(size)), default=0.0)
        steps = {}
        for name, (up, down) in factors.items():
            if name in self.writes:
                try:
                    steps[name] = self._solve(name, (up, down), gradient[name], least)
                except SolverFailure as error:
                    raise SolverFailure(
                        f"{name} of the target: {error} for float32; the target cannot be fitted "
                        "with these weights"
                    ) from error
            else:
                steps[name] = torch.zeros_like(up), torch.zeros_like(down)
        return steps

    def _solve(
        self,
        name: str,
        factors: tuple[Tensor, Tensor],
        gradient: tuple[Tensor, Tensor],
        least: float,
    ) -> tuple[Tensor, Tensor]:
        (up, down), (to_up, to_down) = factors, gradient
        root, tokens = self.damping**0.5, self.reads[name].count
        reads, writes = self.reads[name].damp(root), self.writes[name].damp(root, least)
        seen = _load(reads.multiply(down, 1) @ down.mT, _LOADING_A)  # A·R·Aᵀ
        up_step = tokens * torch.linalg.solve(seen, writes.multiply(to_up.mT, -1)).mT
        made = _load(writes.multiply(up.mT, 1) @ up, _LOADING_B)  # Bᵀ·S·B
        rest = reads.multiply(to_down, -1)
        rest -= torch.linalg.solve(seen, to_down @ down.mT, left=False) @ down
        down_step = tokens * torch.linalg.solve(made, rest)
        if not bool(up.any()):
            down_step = torch.zeros_like(down)
        return up_step.contiguous(), down_step.contiguous()

    def cut(self, name: str, update: LowRank, rank: float) -> LowRank:
        """Returns the closest update of lower rank in the metric ‖S^½·(D − D')·R^½‖_F.

        `update` is D; `rank` of the result, or below 1 the share of ‖S^½·D·R^½‖² that the fewest
        columns hold.
        """
        reads, writes = (side[name].damp(CUT_DAMPING) for side in (self.reads, self.writes))
        seen = LowRank(writes.multiply(update.up.mT, 0.5).mT, reads.multiply(update.down, 0.5))
        cut = seen.truncate(int(rank)) if rank >= 1 else seen.truncate(energy=rank)
        up = writes.multiply(cut.up.mT, -0.5).mT
        return LowRank(up.contiguous(), reads.multiply(cut.down, -0.5).contiguous())


def _load(square: Tensor, share: float) -> Tensor:
    """Adds a share of a matrix's mean diagonal to its diagonal."""
    load = (share * square.diagonal().mean()).clamp_min(1e-30)
    return square + load * torch.eye(len(square), device=square.device)
