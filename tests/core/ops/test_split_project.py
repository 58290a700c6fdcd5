"""split_project: every backend against U UᵀX in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prolora.core.ops import operators

DTYPES = [torch.float32, torch.float64]
# (b, m, k, r): empty, single, ragged, exact tiles, more than one tile and slice each way.
SHAPES = [
    (2, 40, 9, 5),
    (1, 1, 1, 1),
    (1, 64, 64, 32),
    (1, 131, 67, 33),
    (1, 33, 5, 70),
    (3, 17, 16, 16),
]
EMPTY_SHAPES = [(0, 4, 2, 3), (2, 0, 2, 3), (2, 4, 0, 3), (2, 4, 2, 0)]


def problem(shape, dtype, seed=0):
    b, m, k, r = shape
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(b, m, k, dtype=torch.float64, generator=generator)
    x = torch.randn(b, m, r, dtype=torch.float64, generator=generator)
    if m >= k > 0:
        u = torch.linalg.qr(u).Q
    return u.to(dtype), x.to(dtype)


def assert_splits(u, x, par, perp):
    exact = u.double() @ (u.double().mT @ x.double())
    # Rounding grows with the lengths of the two sums.
    tolerance = (u.shape[1] + u.shape[2] + 8) * torch.finfo(x.dtype).eps
    scale = float(u.double().norm() ** 2 * x.double().norm()) + 1e-300
    assert par.dtype == perp.dtype == x.dtype
    assert par.shape == perp.shape == x.shape
    assert (par - exact).abs().amax().item() <= tolerance * scale if par.numel() else True
    torch.testing.assert_close(perp, x - par, rtol=0, atol=0, equal_nan=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_the_projection_and_the_rest(kernels, shape, dtype):
    u, x = problem(shape, dtype)
    assert_splits(u, x, *kernels.split_project(u, x))


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty_problems_leave_everything_outside(kernels, shape):
    u, x = problem(shape, torch.float32)
    par, perp = kernels.split_project(u, x)
    assert par.shape == x.shape and not par.any()
    assert torch.equal(perp, x)


def test_many_small_matrices_keep_apart(kernels):
    u, x = problem((300, 3, 2, 1), torch.float32)
    assert_splits(u, x, *kernels.split_project(u, x))


def test_zero_columns_change_nothing(kernels):
    u, x = problem((2, 30, 6, 4), torch.float64)
    padded = torch.cat([u, torch.zeros(2, 30, 70, dtype=u.dtype)], dim=2)
    for bare, with_zeros in zip(
        kernels.split_project(u, x), kernels.split_project(padded, x), strict=True
    ):
        torch.testing.assert_close(bare, with_zeros, rtol=0, atol=1e-14)


def test_results_repeat_bit_by_bit(kernels):
    u, x = problem((2, 150, 20, 33), torch.float32)
    for first, again in zip(kernels.split_project(u, x), kernels.split_project(u, x), strict=True):
        assert torch.equal(first, again)


def test_large_problems_agree_with_the_small_path(monkeypatch):
    # Large float64 problems go to torch on the CPU; the kernel must give the same.
    u, x = problem((2, 900, 300, 32), torch.float64)
    for ours, dispatched in zip(
        operators.run_split_project(operators._C, u, x, False),
        operators.split_project(u, x),
        strict=True,
    ):
        torch.testing.assert_close(ours, dispatched, rtol=0, atol=1e-12)


@given(
    shape=st.tuples(*[st.integers(0, n) for n in (3, 90, 80, 40)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, seed):
    u, x = problem(shape, dtype, seed)
    assert_splits(u, x, *operators.split_project(u, x))


@given(m=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_parts_are_orthogonal_and_idempotent(m, share, seed):
    u, x = problem((2, m, max(1, int(m * share)), 3), torch.float64, seed)
    par, perp = operators.split_project(u, x)
    torch.testing.assert_close(par.mT @ perp, torch.zeros(2, 3, 3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(operators.split_project(u, par)[0], par, rtol=0, atol=1e-12)
