"""LowRank: products that are never multiplied out, and their best truncation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples

from prolora import LowRank, truncated_svd
from prolora.errors import ShapeMismatch


def random_update(m, n, r, seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(*batch, m, r, dtype=torch.float64, generator=generator)
    return LowRank(up, torch.randn(*batch, r, n, dtype=torch.float64, generator=generator))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 24), st.integers(0, 99))
@settings(max_examples=examples(80), deadline=None)
def test_norm_and_refactoring_equal_the_dense_product(m, n, r, seed):
    update = random_update(m, n, r, seed)
    dense = update.dense()
    assert update.norm() == pytest.approx(float(dense.norm()), rel=1e-10)
    refactored = update.truncate()
    assert refactored.rank <= min(m, n, r)
    torch.testing.assert_close(refactored.dense(), dense)


def test_truncation_is_eckart_young():
    update = random_update(30, 20, 8)
    u, s, vt = torch.linalg.svd(update.dense())
    best = u[:, :3] * s[:3] @ vt[:3]
    torch.testing.assert_close(update.truncate(rank=3).dense(), best)
    share = float((s[:3] ** 2).sum() / (s**2).sum())
    assert update.truncate(energy=share - 1e-9).rank == 3
    assert update.truncate(energy=share + 1e-9).rank == 4


def test_a_stack_is_truncated_like_its_members():
    stack = random_update(12, 9, 5, batch=(3,))
    cut = stack.truncate(rank=2)
    for i in range(3):
        alone = LowRank(stack.up[i], stack.down[i]).truncate(rank=2)
        torch.testing.assert_close(cut.dense()[i], alone.dense())


def test_factors_that_do_not_multiply_and_senseless_truncations_are_refused():
    for up, down in (((3, 2), (3, 4)), ((3,), (3,)), ((2, 3, 2), (2, 4))):
        with pytest.raises(ShapeMismatch, match="do not multiply"):
            LowRank(torch.zeros(up), torch.zeros(down))
    for options in ({"rank": 0}, {"energy": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            random_update(4, 4, 2).truncate(**options)


def test_truncating_parameters_gives_values_without_gradients():
    up, down = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((20, 4), (4, 30)))
    cut = LowRank(up, down).truncate(rank=2)
    assert cut.rank == 2 and not cut.up.requires_grad and not cut.down.requires_grad


def test_an_update_and_a_basis_are_equal_to_themselves_alone():
    """Tensors have no truth value to compare by."""
    one, other = random_update(3, 4, 2), random_update(3, 4, 2)
    assert one == one and one != other and len({one, other}) == 2
    basis = truncated_svd(torch.eye(4), 2)
    assert basis == basis and basis != truncated_svd(torch.eye(4), 2)
