"""How sure a mean is: intervals of a bootstrap, and what a number of images can show."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

DRAWS = 2000
_SEEN = 1.96 + 0.84
"""Standard errors of a difference that 95 % intervals leave out in four of five runs."""


@dataclass(frozen=True)
class Estimate:
    """A mean over LoRAs, prompts and seeds.

    Attributes:
        mean: of all.
        low, high: the 95 % interval; None where there is one number.
        smallest: the smallest difference from 0 that so many images would show in four of five
            runs; None likewise.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    smallest: float | None = None

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The mean of values [LoRAs, prompts, seeds], each of which is drawn again by itself.

        The draws are the same for all values of a shape, so that what differs is paired.
        """
        mean = float(values.mean())
        if values.numel() == 1:
            return cls(mean)
        generator = torch.Generator().manual_seed(0)
        drawn = values.double()[None]
        for n in values.shape:
            places = torch.randint(n, (DRAWS, n), generator=generator)
            shares = torch.zeros(DRAWS, n, dtype=torch.float64)
            shares.scatter_add_(1, places, torch.full_like(shares, 1 / n))
            drawn = torch.einsum("bn,bn...->b...", shares, drawn.expand(DRAWS, *drawn.shape[1:]))
        low, high = torch.quantile(drawn, drawn.new_tensor([0.025, 0.975])).tolist()
        return cls(mean, low, high, _SEEN * float(drawn.std()))

    @property
    def sign(self) -> int:
        """1 where the interval lies above 0, −1 where below, and 0 where it holds 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)

    def to_dict(self) -> dict[str, float | None]:
        """Everything, ready for JSON."""
        return asdict(self)
