"""How far two base models stand apart where a LoRA acts: from weights alone, without any SVD."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from .bases import Base, check_finite
from .bases.modules import matrix_shape
from .errors import NonFiniteWeights
from .options import Progress

PROBES = 32
"""Random vectors behind each spread; over the many modules of a model their noise cancels."""


@dataclass(frozen=True)
class Affinity:
    """Norms and products of a pair of weights, or their sums over many pairs.

    Attributes:
        source: ‖W_s‖²_F.
        target: ‖W_t‖²_F.
        product: ⟨W_s, W_t⟩ = tr(W_sᵀ W_t).
        difference: ‖D‖²_F of the drift D = W_t − W_s.
        spread_difference: ‖D‖²_F times the spread of D, see `spread`.
    """

    source: float
    target: float
    product: float
    difference: float
    spread_difference: float

    @property
    def drift(self) -> float:
        """‖W_t − W_s‖ / ‖W_s‖: 0 for equal weights, about √2 for unrelated ones of equal norm."""
        return math.sqrt(self.difference / self.source) if self.source > 0 else math.inf

    @property
    def cosine(self) -> float:
        """⟨W_s, W_t⟩ / (‖W_s‖‖W_t‖): 1 for equal weights, about 0 for unrelated ones."""
        norms = math.sqrt(self.source * self.target)
        return self.product / norms if norms > 0 else 0.0

    @property
    def spread(self) -> float:
        """Over how many directions the drift is spread: 1 like noise, towards 0 along few.

        The effective rank (Σσ²)²/Σσ⁴ of D over mn/(m + n), what a matrix of noise has; for many
        pairs the mean, weighted by the energy of the drift.
        """
        return self.spread_difference / self.difference if self.difference > 0 else 1.0

    @classmethod
    def of(cls, source: Tensor, target: Tensor) -> Affinity:
        """Two weights [m, n], of any float dtype; summed in float32 or better.

        Raises:
            NonFiniteWeights: NaN or Inf in either.
        """
        wide = torch.float64 in (source.dtype, target.dtype)
        work = torch.float64 if wide else torch.float32
        ours, theirs = source.to(work), target.to(work)
        # The largest entry is taken out, so that squares of large finite weights stay finite.
        largest = [
            float(weight.abs().amax()) if weight.numel() else 0.0 for weight in (ours, theirs)
        ]
        if not all(map(math.isfinite, largest)):
            raise NonFiniteWeights("NaN or Inf in a weight")
        scale = max(largest)
        if scale == 0:
            return cls(0.0, 0.0, 0.0, 0.0, 0.0)
        ours, theirs = ours / scale, theirs / scale
        away = theirs - ours
        products = [
            (x * y).sum().item() for x, y in ((ours, ours), (theirs, theirs), (ours, theirs))
        ]
        difference = away.square().sum().item()
        sums = (*products, difference, difference * _spread(away, difference))
        return cls(*(value * scale * scale for value in sums))

    @classmethod
    def total(cls, parts: Iterable[Affinity]) -> Affinity:
        """The sums over several pairs: drift and cosine of all of them taken as one vector."""
        rows = [astuple(part) for part in parts]
        columns = zip(*rows, strict=True) if rows else ([0.0] for _ in fields(cls))
        return cls(*(math.fsum(column) for column in columns))


def _spread(drift: Tensor, energy: float) -> float:
    """Effective rank of the drift [m, n] over that of noise; energy is ‖D‖²."""
    m, n = drift.shape
    if energy == 0:
        return 1.0
    # Σσ⁴ = ‖DᵀD‖² is the mean of ‖DᵀDz‖² over random z: a few products instead of a Gram matrix.
    generator = torch.Generator().manual_seed(m * n)
    z = torch.randn(n, PROBES, generator=generator, dtype=drift.dtype)
    quartic = (drift.mT @ (drift @ z)).square().sum().item() / PROBES
    return min(1.0, energy**2 / max(quartic, 1e-300) / (m * n / (m + n + 1)))


def measure(
    source: Base,
    target: Base,
    pairs: Sequence[tuple[str, str]],
    progress: Progress | None = None,
) -> list[Affinity]:
    """The affinity of every pair; each weight is read once, one pair at a time.

    Args:
        source: the base that a LoRA comes from.
        target: the base it goes to.
        pairs: (source module, target module) of equal matrix shape.
        progress: called as progress(done, total, target module).

    Raises:
        NonFiniteWeights: names the first tensor that holds NaN or Inf, and its file.
    """
    found = []
    for done, (origin, module) in enumerate(pairs, 1):
        shape = matrix_shape(target.shapes[module])
        try:
            ours, theirs = source.read(origin), target.read(module)
            pair = Affinity.of(ours.reshape(shape), theirs.reshape(shape))
        except NonFiniteWeights:
            check_finite(source, [origin])  # says which tensor, and where in it
            check_finite(target, [module])
            raise
        found.append(pair)
        if progress:
            progress(done, len(pairs), module)
    return found
