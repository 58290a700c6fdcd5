"""Monotone one-to-one assignment: the alignment of two sequences with the largest total score."""

from __future__ import annotations

import torch
from torch import Tensor


def monotone_assignment(scores: Tensor) -> list[tuple[int, int]]:
    """Finds pairs (i, j), both strictly increasing, with the largest total score.

    Dynamic programming: with D[i, j] the best total of the first i rows and j columns,

        D[i, j] = max(D[i−1, j], D[i, j−1], D[i−1, j−1] + scores[i−1, j−1]).

    A pair without a positive score is never made, so rows and columns may stay alone. `scores` is
    [rows, columns], any float dtype, no NaN.
    """
    table = scores.double().cpu()
    rows, columns = table.shape
    best = torch.zeros(rows + 1, columns + 1, dtype=torch.float64)
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            alone = torch.maximum(best[i - 1, j], best[i, j - 1])
            best[i, j] = torch.maximum(alone, best[i - 1, j - 1] + table[i - 1, j - 1])
    pairs = []
    i, j = rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            pairs.append((i - 1, j - 1))
            i, j = i - 1, j - 1
    return pairs[::-1]
