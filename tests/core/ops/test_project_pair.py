"""project_pair: every backend against the projectors in float64."""

import pytest
import torch
from backends import Kernels, load
from diagonal import pair_up
from hypothesis import given
from hypothesis import strategies as st

from prolora.core import reference
from prolora.core.ops.project_pair import project_pair, run_project_pair

DTYPES = [torch.float32, torch.float64]
# (b, m, ks, kt, r)
# The third is moved 16 bytes at a time, the fourth in parts of its depth.
SHAPES = [(2, 40, 9, 5, 4), (1, 1, 1, 1, 1), (2, 132, 68, 40, 33), (3, 777, 9, 4, 3)]
EMPTY = [(0, 4, 2, 3, 1), (2, 4, 0, 3, 2), (2, 4, 2, 0, 2), (2, 4, 2, 3, 0)]


def problem(shape, dtype, seed=0):
    b, m, ks, kt, r = shape
    generator = torch.Generator().manual_seed(seed)
    us, ut = (
        torch.linalg.qr(torch.randn(b, m, k, dtype=torch.float64, generator=generator))[0]
        for k in (min(ks, m), min(kt, m))
    )
    x = torch.randn(b, r, m, dtype=torch.float64, generator=generator)
    return us.to(dtype), ut.to(dtype), x.to(dtype)


def assert_moved(us, ut, x, found):
    expected = reference.project_pair(us.double(), ut.double(), x.double())
    tolerance = 8 * (x.shape[2] + 8) * torch.finfo(x.dtype).eps
    for got, exact in zip(found, expected, strict=True):
        assert got.dtype == x.dtype and got.shape == exact.shape
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("shape", "dtype"), pair_up(SHAPES + EMPTY, DTYPES))
def test_range_goes_to_range_and_complement_to_complement(kernels, shape, dtype):
    us, ut, x = problem(shape, dtype)
    assert_moved(us, ut, x, kernels.project_pair(us, ut, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_left_of_rows_almost_within_is_still_orthogonal(kernels, dtype):
    """1e-6 (1e-14) of a row lies outside: one pass would leave as much of U in it."""
    us, ut, x = problem((2, 80, 20, 20, 5), dtype)
    tiny = 32 * torch.finfo(dtype).eps
    inside = x @ us @ us.mT
    outside = x - inside
    x = inside + tiny * (outside - outside @ us @ us.mT)
    rest = kernels.project_pair(us, us, x)[0][:, 5:].double()
    rest = rest / rest.norm(dim=2, keepdim=True)
    assert (rest @ us.double()).abs().max() < 100 * torch.finfo(dtype).eps
    # And in the target's complement, of what the source left outside.
    moved = kernels.project_pair(ut, us, inside)[1][:, 5:].double()
    assert (moved @ us.double()).abs().max() < 100 * torch.finfo(dtype).eps


def test_only_matrices_that_lost_nearly_all_go_through_a_second_time(kernels):
    us, ut, x = problem((2, 60, 20, 12, 3), torch.float32)
    plain = kernels.project_pair(us, ut, x)
    x[0] = x[0] @ us[0] @ us[0].mT
    mixed = kernels.project_pair(us, ut, x)
    for one, other in zip(plain, mixed, strict=True):
        torch.testing.assert_close(one[1], other[1], rtol=0, atol=0)
    assert (mixed[0][0, 3:] @ us[0]).abs().max() < 1e-12 < (x[0] @ us[0]).abs().max()


def test_a_gpu_without_tf32_and_float64_have_no_kernels(monkeypatch):
    module = load("emulated", "_emulated")
    given = problem((1, 40, 9, 5, 4), torch.float32)
    with pytest.raises(RuntimeError, match="no kernels for this precision"):
        run_project_pair(module, *(x.double() for x in given), True)
    monkeypatch.setenv("EMU_CAPABILITY", "75")
    with pytest.raises(RuntimeError, match="no TF32"):
        run_project_pair(module, *given, True)


def test_a_product_in_parts_of_memory_that_begins_anywhere_is_as_accurate(monkeypatch):
    monkeypatch.setenv("EMU_SHARED_BYTES", str(48 << 10))
    module = load("emulated", "_emulated")
    us, ut, x = problem((1, 588, 70, 8, 2), torch.float32)
    # In parts, which need memory of their own.
    assert module.project_pair_scratch(1, 588, 70, 8, 2, True) > 4 * 70
    # Memory that begins 4 bytes after a multiple of 16.
    shifted = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert_moved(us, ut, x, Kernels(module, cuda=True).project_pair(us, ut, shifted))


@pytest.mark.parametrize(
    ("tiles", "depth", "blocks", "parts"),
    [
        (20, 10240, 528, (25, 416)),  # 2 x (10240, 588) for 32 rows on an H100: 500 blocks
        (640, 1280, 528, (1, 1280)),  # enough without
        (1, 511, 528, (1, 511)),  # too short
        (1, 777, 528, (3, 288)),
        (0, 777, 528, (1, 777)),
    ],
)
def test_the_depth_is_cut_so_that_a_gpu_is_full(tiles, depth, blocks, parts):
    assert load("cpu", "_C").depth_parts(tiles, depth, blocks) == parts


@given(
    shape=st.tuples(*[st.integers(1, n) for n in (3, 60, 50, 50, 20)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, seed):
    us, ut, x = problem(shape, dtype, seed)
    assert_moved(us, ut, x, project_pair(us, ut, x))
