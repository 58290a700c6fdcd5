"""How far two weights stand apart: from their numbers alone, without any SVD."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from .exceptions import NonFiniteWeights

BLOCK_ENTRIES = 1 << 18
"""Entries that are worked on at a time, on a CPU."""

DEVICE_ENTRIES = 1 << 24
"""The same on a GPU, which waits for every launch."""

FAR = 2.0**24
"""Weights whose largest entry is between 1/FAR and FAR are not scaled."""

RANDOM_VECTORS = 16
"""Random vectors behind each spread; over the many modules of a model their noise cancels."""


@dataclass(frozen=True)
class Affinity:
    """Norms and products of a pair of weights, or sums of them."""

    source: float  # ‖W_s‖²_F
    target: float  # ‖W_t‖²_F
    product: float  # ⟨W_s, W_t⟩ = tr(W_sᵀ W_t)
    difference: float  # ‖D‖²_F of the drift D = W_t − W_s
    spread_difference: float  # ‖D‖²_F times the spread of D, see `spread`

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
        """Compares two weights [m, n] of any float dtype, in float32 or better.

        On their device, for which the host waits twice.

        Raises:
            NonFiniteWeights: NaN or Inf in either.
        """
        wide = torch.float64 in (source.dtype, target.dtype)
        work = torch.float64 if wide else torch.float32
        m, n = source.shape
        largest = _largest_entry(source, target)
        if largest == 0:
            return cls(0.0, 0.0, 0.0, 0.0, 0.0)
        # A far exponent is taken out, so that squares of large finite weights stay finite.
        scale = 1.0 if 1 / FAR < largest < FAR else largest
        # Σσ⁴ = ‖DᵀD‖² is the mean of ‖DᵀDz‖² over random z: products instead of a Gram matrix.
        generator = torch.Generator().manual_seed(m * n)
        columns = torch.randn(n, RANDOM_VECTORS, generator=generator, dtype=work)
        # Vectors as rows: these products take a fifth less time so.
        z = source.new_empty(RANDOM_VECTORS, n, dtype=work).copy_(columns.T)
        image, sums = torch.zeros_like(z), z.new_zeros(5, dtype=torch.float64)
        # A few rows at a time stay in a core's cache, and need no memory of a weight's size.
        rows = max(1, (BLOCK_ENTRIES if source.is_cpu else DEVICE_ENTRIES) // max(1, n))
        for pair in zip(source.split(rows), target.split(rows), strict=True):
            x, y = (part.to(work) for part in pair)
            if scale != 1:
                x, y = x / scale, y / scale
            away = y - x
            products = ((x, x), (y, y), (x, y), (away, away))
            dots = [torch.dot(left.flatten(), right.flatten()) for left, right in products]
            sums[:4] += torch.stack(dots)
            image.addmm_(z @ away.mT, away)
        sums[4] = image.square().sum()
        *norms, quartic = sums.tolist()
        relative = _relative_rank(norms[3], quartic / RANDOM_VECTORS, m, n)
        return cls(*(value * scale * scale for value in (*norms, norms[3] * relative)))

    @classmethod
    def total(cls, parts: Iterable[Affinity]) -> Affinity:
        """Sums several pairs: drift and cosine of all as one vector."""
        rows = [astuple(part) for part in parts]
        columns = zip(*rows, strict=True) if rows else ([0.0] for _ in fields(cls))
        return cls(*(math.fsum(column) for column in columns))


def _largest_entry(*weights: Tensor) -> float:
    """Returns the largest magnitude in weights of any float dtype; waits once.

    Raises:
        NonFiniteWeights: it is not finite.
    """
    # float8 has no maximum.
    values = [x.float() if x.element_size() == 1 else x for x in weights if x.numel()]
    ends = [end.double() for x in values for end in torch.aminmax(x)]
    largest = torch.stack(ends).abs().amax().item() if ends else 0.0  # NaN where there is one
    if not math.isfinite(largest):
        raise NonFiniteWeights("NaN or Inf in a weight")
    return largest


def _relative_rank(energy: float, quartic: float, m: int, n: int) -> float:
    """Divides the effective rank of a drift [m, n] by noise's; energy Σσ², quartic Σσ⁴."""
    if energy == 0:
        return 1.0
    return min(1.0, energy**2 / max(quartic, 1e-300) / (m * n / (m + n + 1)))
