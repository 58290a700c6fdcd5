"""Linear maps from the source's residual streams to one of the target's, by ridge regression."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Streams


class RidgeMap:
    """y ≈ x·T + const over tokens, from covariances summed in float64.

    T = (C_xx + λ·mean(diag C_xx)·I)⁻¹ C_xy with centred covariances. Only sums are kept, so
    memory does not grow with the number of probes.
    """

    def __init__(self) -> None:
        """Starts with no tokens."""
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self.matrix: Tensor | None = None
        self.explained = float("nan")

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds tokens x [..., p] of the source and y [..., q] of the target."""
        x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
        parts = {"x": x.sum(0), "y": y.sum(0), "xx": x.mT @ x, "xy": x.mT @ y, "yy": y.square()}
        parts["yy"] = parts["yy"].sum(0)
        self.count += len(x)
        for key, part in parts.items():
            self.sums[key] = self.sums[key] + part if key in self.sums else part

    def solve(self, ridge: float) -> None:
        """Sets `matrix` [p, q] and `explained`, the share of the variance of y that x explains."""
        s, n = self.sums, self.count
        xx = s["xx"] - torch.outer(s["x"], s["x"]) / n
        xy = s["xy"] - torch.outer(s["x"], s["y"]) / n
        yy = (s["yy"] - s["y"].square() / n).sum()
        loaded = xx + ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype).to(xx)
        t = torch.linalg.solve(loaded, xy)
        left = yy - 2 * (t * xy).sum() + (t * (xx @ t)).sum()
        self.matrix, self.explained = t, float(1 - left / yy.clamp_min(1e-30))
        self.sums = {}

    def __call__(self, change: Tensor) -> Tensor:
        """The target's change [..., q] for a change [..., p] of the source's streams."""
        if self.matrix is None:
            raise RuntimeError("a map must be solved before it is used")
        return (change.double() @ self.matrix).to(change.dtype)


MAX_COLUMNS = 6144
"""Bound on the inputs of a map: its covariance takes 8·columns² bytes, and a map with more inputs
than tokens is not determined."""


def source_features(
    streams: dict[str, Streams], stream: int, tokens: int, depth: float = 0.5
) -> Tensor | None:
    """The source's streams of one kind and number of tokens, concatenated.

    Args:
        streams: the source's blocks and their streams.
        stream: index of a block's output; blocks with fewer outputs are left out.
        tokens: the target's number of tokens; the source's must be the same.
        depth: relative depth of the predicted stream in the target, 0 … 1. Where the source's
            streams have more than MAX_COLUMNS columns, those nearest in depth are chosen.

    Returns:
        [n, tokens, Σ widths], or None where no block fits. All depths together predict a stream
        better than any single depth, and blocks need not be matched by hand.
    """
    fitting = [
        (i / max(1, len(streams) - 1), block[stream])
        for i, block in enumerate(streams.values())
        if stream < len(block) and block[stream].shape[1] == tokens
    ]
    near = sorted(range(len(fitting)), key=lambda i: abs(fitting[i][0] - depth))
    chosen: list[int] = []
    columns = 0
    for i in near:
        columns += fitting[i][1].shape[-1]
        if chosen and columns > MAX_COLUMNS:
            break
        chosen.append(i)
    return torch.cat([fitting[i][1] for i in sorted(chosen)], -1) if chosen else None
