"""panel_qr is judged as LAPACK's tests judge a QR: reconstruction and orthogonality."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prolora import errors
from prolora.core import recompression
from prolora.core.ops.panel_qr import panel_qr
from prolora.core.recompression import orthonormal_rows

DTYPES = [torch.float32, torch.float64]
SHAPES = [(3, 5, 70), (1, 1, 1), (2, 1, 30), (1, 33, 300), (2, 16, 16)]
# What a row loses when it is dropped: 8 eps in float32; in float64 the Gram matrix is no better
# than its numbers.
DROPPED = {torch.float32: 8 * 2.0**-23, torch.float64: 1.5e-7}


def random(shape, dtype, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_qr(panel, q, lower, rank, loss=0.0):
    r = panel.shape[1]
    unit = 8 * (r + 1) * torch.finfo(panel.dtype).eps
    assert q.dtype == lower.dtype == panel.dtype and rank.dtype == torch.int64
    assert not lower.triu(1).any()
    p, q, lower = panel.double(), q.double(), lower.double()
    kept = (q.norm(dim=2) > 0).double()
    assert torch.equal(kept.sum(1).long(), rank)
    assert ((q @ q.mT - torch.diag_embed(kept)).norm(dim=(1, 2)) <= unit).all()
    assert ((lower @ q - p).norm(dim=2) <= (unit + loss) * p.norm(dim=2)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_orthonormal_and_rebuild_the_panel(kernels, shape, dtype):
    panel = random(shape, dtype)
    q, lower, rank = kernels.panel_qr(panel)
    assert_qr(panel, q, lower, rank)
    assert (rank == shape[1]).all()


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 0, 0)], ids=str)
def test_empty_panels_give_empty_factors(kernels, shape):
    q, lower, rank = kernels.panel_qr(torch.empty(shape))
    assert q.shape == shape and lower.shape == (shape[0], shape[1], shape[1])
    assert not rank.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_others_span_are_dropped(kernels, dtype):
    panel = random((2, 9, 3), dtype) @ random((2, 3, 40), dtype, 1)
    panel[1, 4] = 0
    q, lower, rank = kernels.panel_qr(panel)
    done = rank >= 0  # in float64 what is left may be noise that looks like a row: flagged
    assert done.all() or dtype == torch.float64
    assert_qr(panel[done], q[done], lower[done], rank[done], loss=3 * DROPPED[dtype])
    assert (rank[done] >= 3).all() and (rank[done] <= 4).all()
    assert not kernels.panel_qr(torch.zeros(1, 3, 8))[2].any()


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 3e-6, 5e-7, 1e-7])
def test_rows_close_to_each_other_cost_no_accuracy(kernels, angle):
    turned = torch.linalg.qr(random((1, 90, 20), torch.float64))[0].mT
    panel = turned.clone()
    panel[:, 10:] = turned[:, :10] + angle * turned[:, 10:]
    for dtype in DTYPES:
        assert_qr(panel.to(dtype), *kernels.panel_qr(panel.to(dtype)), loss=2 * DROPPED[dtype])


@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e36])
def test_rows_of_any_size(kernels, scale):
    panel = random((1, 12, 60), torch.float32).clamp(-3, 3)
    panel = panel * torch.logspace(0, -2, 12)[:, None] * scale
    assert_qr(panel, *kernels.panel_qr(panel))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_panels_are_flagged_and_spare_the_others(kernels, bad):
    panel = random((3, 4, 30), torch.float32)
    panel[1, 2, 3] = bad
    q, lower, rank = kernels.panel_qr(panel)
    assert rank.tolist() == [4, -1, 4]
    assert_qr(panel[::2], q[::2], lower[::2], rank[::2])


def test_what_cholesky_cannot_do_goes_to_reflections(kernels, monkeypatch):
    """The widest spread of sizes there is, mixed: flagged in float64, and still orthonormal."""
    monkeypatch.setattr(recompression, "panel_qr", kernels.panel_qr)
    mix = random((1, 20, 20), torch.float64) * torch.logspace(0, -9, 20, dtype=torch.float64)
    panel = mix @ random((1, 20, 90), torch.float64, 1)
    panel = torch.cat([panel, random((1, 20, 90), torch.float64, 2)])
    rank = kernels.panel_qr(panel)[2].tolist()
    assert rank[1] == 20 and (rank[0] == -1 or kernels.module is None)
    for dtype in DTYPES:
        q, lower = orthonormal_rows(panel.to(dtype))
        assert_qr(panel.to(dtype), q, lower, (q.norm(dim=2) > 0).sum(1), DROPPED[dtype])


def test_more_rows_than_columns_go_to_reflections():
    wide = random((2, 7, 3), torch.float32)  # more rows than columns
    q, lower = orthonormal_rows(wide)
    torch.testing.assert_close(lower @ q, wide)


@given(
    b=st.integers(0, 3),
    r=st.integers(0, 20),
    more=st.integers(0, 60),
    rank=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_any_shape_and_rank(b, r, more, rank, seed):
    panel = random((b, r, rank), torch.float32, seed) @ random((b, rank, r + more), torch.float32)
    q, lower, found = panel_qr(panel)
    assert_qr(panel, q, lower, found, loss=20 * DROPPED[torch.float32])


def test_leading_dimensions_are_kept_and_sizes_are_refused():
    panel = random((2, 3, 4, 30), torch.float32)
    q, lower, rank = panel_qr(panel)
    assert (q.shape, lower.shape, rank.shape) == (panel.shape, (2, 3, 4, 4), (2, 3))
    for shape in ((5, 4), (129, 400)):
        with pytest.raises(errors.ShapeMismatch, match=r"use torch\.linalg\.qr"):
            panel_qr(torch.zeros(shape))


def test_operator_passes_torchs_own_checks():
    torch.library.opcheck(torch.ops.prolora.panel_qr.default, (random((2, 3, 9), torch.float32),))
