"""overlap: every backend against ‖UsᵀUt‖² in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prolora.core.ops import operators

DTYPES = [torch.float32, torch.float64]
# (b, m, ks, kt)
SHAPES = [
    (2, 40, 9, 5),
    (1, 1, 1, 1),
    (1, 64, 64, 64),
    (1, 50, 65, 130),
    (5, 17, 16, 3),
    (1, 3, 200, 2),
]
EMPTY_SHAPES = [(0, 4, 2, 3), (2, 0, 2, 3), (2, 4, 0, 3), (2, 4, 2, 0)]


def problem(shape, dtype, seed=0):
    b, m, ks, kt = shape
    generator = torch.Generator().manual_seed(seed)
    us = torch.randn(b, m, ks, dtype=dtype, generator=generator)
    ut = torch.randn(b, m, kt, dtype=dtype, generator=generator)
    return us, ut


def assert_overlaps(us, ut, out):
    exact = (us.double().mT @ ut.double()).square().sum((1, 2))
    assert out.dtype == torch.float64 and out.shape == us.shape[:1]
    tolerance = (us.shape[1] + 8) * torch.finfo(us.dtype).eps
    scale = us.double().norm(dim=(1, 2)) ** 2 * ut.double().norm(dim=(1, 2)) ** 2
    assert ((out - exact).abs() <= tolerance * scale).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_overlap_is_the_squared_norm_of_the_product(kernels, shape, dtype):
    us, ut = problem(shape, dtype)
    assert_overlaps(us, ut, kernels.overlap(us, ut))


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty_problems_share_nothing(kernels, shape):
    us, ut = problem(shape, torch.float32)
    assert torch.equal(kernels.overlap(us, ut), torch.zeros(shape[0], dtype=torch.float64))


def test_a_subspace_shares_itself(kernels):
    u = torch.linalg.qr(torch.randn(3, 90, 70)).Q
    torch.testing.assert_close(
        kernels.overlap(u, u), torch.full((3,), 70.0).double(), rtol=1e-5, atol=0
    )


def test_squares_are_added_in_double(kernels):
    # 1 + 2^-12: its square ends with 2^-24, which float32 would drop.
    us = torch.tensor([[[1 + 2.0**-12]]])
    assert kernels.overlap(us, torch.ones(1, 1, 1)).item() == (1 + 2.0**-12) ** 2


def test_results_repeat_bit_by_bit(kernels):
    us, ut = problem((9, 100, 70, 80), torch.float32)
    assert torch.equal(kernels.overlap(us, ut), kernels.overlap(us, ut))


@given(
    shape=st.tuples(*[st.integers(0, n) for n in (4, 200, 80, 80)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, seed):
    us, ut = problem(shape, dtype, seed)
    assert_overlaps(us, ut, operators.overlap(us, ut))


@given(m=st.integers(1, 50), ks=st.integers(1, 50), kt=st.integers(1, 50), seed=st.integers(0, 99))
def test_overlap_is_symmetric_and_bounded(m, ks, kt, seed):
    us, ut = problem((2, m, min(m, ks), min(m, kt)), torch.float64, seed)
    us, ut = torch.linalg.qr(us).Q, torch.linalg.qr(ut).Q
    shared = operators.overlap(us, ut)
    torch.testing.assert_close(shared, operators.overlap(ut, us), rtol=0, atol=1e-12)
    assert (shared >= 0).all() and (shared <= min(m, ks, kt) + 1e-12).all()
