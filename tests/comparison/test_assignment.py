"""The alignment found is the best of all, and none that is not needed."""

from itertools import combinations, pairwise

import pytest
import torch

from prolora.comparison.assignment import monotone_assignment


def best_total(scores):
    """Over every increasing choice of rows and columns."""
    rows, columns = scores.shape
    return max(
        sum(float(scores[i, j]) for i, j in zip(some, others, strict=True))
        for size in range(min(rows, columns) + 1)
        for some in combinations(range(rows), size)
        for others in combinations(range(columns), size)
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_monotone_assignment_has_a_larger_total(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(1, 6, (2,), generator=generator).tolist()
    scores = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    pairs = monotone_assignment(scores)
    assert sum(float(scores[i, j]) for i, j in pairs) == pytest.approx(best_total(scores))
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(pairs))
    assert all(scores[i, j] > 0 for i, j in pairs)


def test_order_overrules_the_best_score_of_a_pair_and_nothing_is_paired_where_nothing_scores():
    for scores, pairs in (
        (torch.tensor([[0.5, 0.9], [0.9, 0.5]]), ([(0, 0), (1, 1)],)),
        (torch.tensor([[0.1, 0.9], [0.9, 0.1]]), ([(0, 1)], [(1, 0)])),
        (torch.zeros(3, 4), ([],)),
        (torch.zeros(0, 4), ([],)),
    ):
        assert monotone_assignment(scores) in pairs
