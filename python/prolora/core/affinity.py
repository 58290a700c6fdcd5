"""Drift and cosine of a pair of weights, without any SVD."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from .exceptions import NonFiniteWeights

BLOCK_ENTRIES = 1 << 18
"""Entries that are read at a time on a CPU: a block stays in a core's cache."""

DEVICE_ENTRIES = 1 << 24
"""The same on a GPU, which waits for every launch."""

FAR = 2.0**24
"""Weights whose largest entry is between 1/FAR and FAR are not scaled."""


@dataclass(frozen=True)
class Affinity:
    """Norms and products of a pair of weights, or sums of them."""

    source: float  # ‖W_s‖²_F
    target: float  # ‖W_t‖²_F
    product: float  # ⟨W_s, W_t⟩ = tr(W_sᵀ W_t)
    difference: float  # ‖D‖²_F of the drift D = W_t − W_s

    @property
    def drift(self) -> float:
        """‖W_t − W_s‖ / ‖W_s‖: 0 for equal weights, about √2 for unrelated ones of equal norm."""
        return math.sqrt(self.difference / self.source) if self.source > 0 else math.inf

    @property
    def cosine(self) -> float:
        """⟨W_s, W_t⟩ / (‖W_s‖‖W_t‖): 1 for equal weights, about 0 for unrelated ones."""
        norms = math.sqrt(self.source * self.target)
        return self.product / norms if norms > 0 else 0.0

    @classmethod
    def of(cls, source: Tensor, target: Tensor) -> Affinity:
        """Compares two weights [m, n] of any float dtype, in float32 or better.

        On their device, for which the host waits twice.

        Raises:
            NonFiniteWeights: NaN or Inf in either.
        """
        wide = torch.float64 in (source.dtype, target.dtype)
        work = torch.float64 if wide else torch.float32
        largest = _largest_entry(source, target)
        if largest == 0:
            return cls(0.0, 0.0, 0.0, 0.0)
        # A far exponent is taken out, so that squares of large finite weights stay finite.
        scale = 1.0 if 1 / FAR < largest < FAR else largest
        sums = source.new_zeros(4, dtype=torch.float64)
        # Block by block: a copy of a whole weight in float32 would not fit the cache.
        entries = BLOCK_ENTRIES if source.is_cpu else DEVICE_ENTRIES
        rows = max(1, entries // max(1, source.shape[1]))
        for pair in zip(source.split(rows), target.split(rows), strict=True):
            x, y = (part.to(work) for part in pair)
            if scale != 1:
                x, y = x / scale, y / scale
            away = y - x
            products = ((x, x), (y, y), (x, y), (away, away))
            sums += torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in products])
        return cls(*(value * scale * scale for value in sums.tolist()))

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
