"""How far two weights stand apart: from their numbers alone, without any SVD."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from .exceptions import NonFiniteWeights

BLOCK_ENTRIES = 1 << 18
"""Entries that are worked on at a time."""

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

        Raises:
            NonFiniteWeights: NaN or Inf in either.
        """
        wide = torch.float64 in (source.dtype, target.dtype)
        work = torch.float64 if wide else torch.float32
        m, n = source.shape
        # A few rows at a time stay in a core's cache, and need no memory of a weight's size.
        rows = max(1, BLOCK_ENTRIES // max(1, n))
        blocks = [(source[i : i + rows], target[i : i + rows]) for i in range(0, m, rows)]
        largest = max(_largest_entry(source), _largest_entry(target))
        if largest == 0:
            return cls(0.0, 0.0, 0.0, 0.0, 0.0)
        # A far exponent is taken out, so that squares of large finite weights stay finite.
        scale = 1.0 if 1 / FAR < largest < FAR else largest
        # Σσ⁴ = ‖DᵀD‖² is the mean of ‖DᵀDz‖² over random z: products instead of a Gram matrix.
        generator = torch.Generator().manual_seed(m * n)
        z = torch.randn(n, RANDOM_VECTORS, generator=generator, dtype=work).to(source.device)
        # Vectors as rows: these products take a fifth less time so.
        z = z.T.contiguous()
        image = torch.zeros_like(z)
        sums = [0.0] * 4
        for pair in blocks:
            ours, theirs = (part.to(work) for part in pair)
            if scale != 1:
                ours, theirs = ours / scale, theirs / scale
            away = theirs - ours
            products = ((ours, ours), (theirs, theirs), (ours, theirs), (away, away))
            for i, (x, y) in enumerate(products):
                sums[i] += float(torch.dot(x.flatten(), y.flatten()))
            image.addmm_(z @ away.mT, away)
        quartic = float(image.square().sum()) / RANDOM_VECTORS
        sums.append(sums[3] * _relative_rank(sums[3], quartic, m, n))
        return cls(*(value * scale * scale for value in sums))

    @classmethod
    def total(cls, parts: Iterable[Affinity]) -> Affinity:
        """Sums several pairs: drift and cosine of all as one vector."""
        rows = [astuple(part) for part in parts]
        columns = zip(*rows, strict=True) if rows else ([0.0] for _ in fields(cls))
        return cls(*(math.fsum(column) for column in columns))


def _largest_entry(x: Tensor) -> float:
    """Returns the largest magnitude in x, of any float dtype.

    Raises:
        NonFiniteWeights: it is not finite.
    """
    values = x.float() if x.element_size() == 1 else x  # float8 has no maximum
    least, most = (float(end) for end in torch.aminmax(values)) if x.numel() else (0.0, 0.0)
    largest = max(most, -least)  # NaN is in both
    if not math.isfinite(largest):
        raise NonFiniteWeights("NaN or Inf in a weight")
    return largest


def _relative_rank(energy: float, quartic: float, m: int, n: int) -> float:
    """Divides the effective rank of a drift [m, n] by noise's; energy Σσ², quartic Σσ⁴."""
    if energy == 0:
        return 1.0
    return min(1.0, energy**2 / max(quartic, 1e-300) / (m * n / (m + n + 1)))
