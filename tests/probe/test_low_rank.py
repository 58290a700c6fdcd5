"""The cut to low rank keeps what the probes see of an update."""

from __future__ import annotations

import torch

from prolora.probe.fitting.low_rank import count_directions, cut_to_rank


def test_a_share_keeps_as_few_directions_as_hold_it_and_a_number_that_many():
    values = torch.tensor([3.0, 1.0, 1.0])
    assert [count_directions(values, rank) for rank in (0.8, 0.85, 2, 7)] == [1, 2, 2, 3]


def test_a_diagonal_factor_is_cut_as_the_matrix_with_that_diagonal():
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    left, right = torch.rand(5, generator=generator), torch.rand(6, generator=generator)
    one = cut_to_rank(update, left.double(), right.double(), 2, 0.01)
    two = cut_to_rank(update, left.double().diag(), right.double().diag(), 2, 0.01)
    torch.testing.assert_close(one.dense(), two.dense())


def test_without_a_left_factor_all_outputs_count_the_same():
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    gram = torch.diag(torch.rand(6, generator=generator).double() + 0.1)
    one = cut_to_rank(update, None, gram, 2, 0.01)
    two = cut_to_rank(update, torch.ones(5).double(), gram, 2, 0.01)
    torch.testing.assert_close(one.dense(), two.dense())
