"""Principal angles of whole stacks, as a GPU takes them: right, flagged, and in few calls."""

import math

import pytest
import torch
from dispatched import Calls
from spectra import basis_of

from prolora import principal_angles
from prolora.core import angles
from prolora.core.similarity import angle_quantiles
from prolora.core.svd import stacks


@pytest.fixture(autouse=True)
def whole_stacks(monkeypatch):
    """The CPU takes stacks as a GPU does."""
    monkeypatch.setattr(stacks, "FORCE_BATCHED", True)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(b, m, k, seed=0):
    return torch.linalg.qr(randn(b, m, k, seed=seed))[0]


def planted(b, m, p, angles):
    """Pairs of subspaces [b, m, p] and [b, m, q] with given angles, through random mixtures."""
    q = len(angles)
    frame = orthonormal(b, m, p + q)
    x = frame[..., :p]
    y = x[..., :q] * angles.cos() + frame[..., p:] * angles.sin()
    mixed = x @ orthonormal(b, p, p, seed=1) * torch.arange(1, p + 1)
    return mixed, y @ orthonormal(b, q, q, seed=2)


def every_size(q):
    """Angles from 0 over 1e-13 to as close to a right one."""
    small = torch.logspace(-13, -0.2, q // 2, dtype=torch.float64)
    return torch.cat([torch.zeros(1).double(), small, math.pi / 2 - small.flip(0)])[:q]


@pytest.mark.parametrize(
    ("m", "p", "q"), [(60, 8, 8), (90, 30, 21), (300, 140, 100), (270, 132, 130), (20, 19, 1)]
)
def test_angles_of_every_size_are_exact(m, p, q):
    """Small ones, large ones and more than 128 of them, beside the errors of the input itself."""
    exact = every_size(q)
    x, y = planted(2, m, p, exact)
    found, trusted = angles.angles_by_cholesky(x, y)
    assert trusted.all()
    atol = 2e-13 if q <= 128 else 1e-12
    torch.testing.assert_close(found, exact.expand(2, q), rtol=0, atol=atol)


@pytest.mark.parametrize("condition", [1e8, 1e12])
def test_columns_that_nearly_depend_on_each_other_span_what_they_span(condition):
    frame, y = orthonormal(2, 60, 10), randn(2, 60, 7, seed=1)
    shrink = torch.logspace(0, -math.log10(condition), 10, dtype=torch.float64)
    x = frame * shrink @ orthonormal(2, 10, 10, seed=2)
    found, trusted = angles.angles_by_cholesky(x, y)
    assert trusted.all()
    exact = angles.angles_by_reflections(frame, y)
    torch.testing.assert_close(found, exact, rtol=0, atol=30 * condition * 2.0**-52)


@pytest.mark.parametrize("scale", [1e-300, 1e250])
def test_no_scale_of_the_columns_matters(scale):
    x, y = randn(2, 30, 4), randn(2, 30, 3, seed=1)
    scaled, trusted = angles.angles_by_cholesky(x * scale, y / scale)
    assert trusted.all()
    torch.testing.assert_close(scaled, principal_angles(x, y), rtol=0, atol=1e-14)


def test_missing_rank_is_noticed_and_means_what_it_means_on_the_cpu(monkeypatch):
    """A column twice, one of zeros, one that two others make; the rest of the stack is spared."""
    x, y = randn(5, 30, 6), randn(5, 30, 4, seed=1)
    x[0, :, 3] = x[0, :, 2]
    x[1, :, 0] = 0
    y[2, :, 1] = y[2, :, 0] - 3 * y[2, :, 3]
    assert angles.angles_by_cholesky(x, y)[1].tolist() == [False, False, False, True, True]
    found = angles.column_angles(x, y)
    monkeypatch.setattr(stacks, "FORCE_BATCHED", False)
    torch.testing.assert_close(found, angles.column_angles(x, y), rtol=0, atol=1e-13)


def test_matrices_that_a_solver_fails_on_are_done_again(monkeypatch):
    x, y = randn(3, 30, 6), randn(3, 30, 6, seed=1)
    source, target = basis_of(orthonormal(3, 30, 6)), basis_of(orthonormal(3, 30, 6, seed=1))
    expected, quantiles = principal_angles(x, y), angle_quantiles(source, target)
    solve = angles.small_singular_values

    def fail(a):
        return solve(a).index_fill(0, torch.tensor([1]), torch.nan)

    monkeypatch.setattr(angles, "small_singular_values", fail)
    torch.testing.assert_close(principal_angles(x, y), expected, rtol=0, atol=1e-14)
    for one, other in zip(angle_quantiles(source, target), quantiles, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_quantiles_of_a_stack_of_different_ranks_are_those_of_each_pair(dtype, monkeypatch):
    """Fewer and more columns than half of the space, none, all of it, and either side the wider."""
    ours, theirs = [3, 20, 12, 30, 0, 17], [5, 15, 25, 9, 4, 17]
    frames = orthonormal(6, 30, 30).to(dtype), orthonormal(6, 30, 25, seed=1).to(dtype)
    source, target = basis_of(frames[0], ours), basis_of(frames[1], theirs)
    together = angle_quantiles(source, target, [0, 0.3, 0.5, 1])
    monkeypatch.setattr(stacks, "FORCE_BATCHED", False)
    alone = angle_quantiles(source, target, [0, 0.3, 0.5, 1])
    for one, other in zip(together, alone, strict=True):
        assert one[4].isnan().all()
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-7, equal_nan=True
        )


@pytest.mark.parametrize("k", [12, 130])
def test_calls_and_waits_do_not_grow_with_the_stack(k):
    """One wait for the angles of columns beside the two that look for NaN, one for quantiles."""
    counts = []
    for b in (2, 2, 5):  # the first draws a vector that is kept
        x, y = orthonormal(b, 280, k), orthonormal(b, 280, k, seed=1)
        source, target = basis_of(x), basis_of(y)
        with Calls() as columns:
            principal_angles(x, y)
        with Calls() as quantiles:
            angle_quantiles(source, target)
        counts.append((columns.counts, quantiles.counts))
    assert counts[1] == counts[2]
    for calls, most in zip(counts[1], (3, 1), strict=True):
        assert calls["nonzero"] + calls["_local_scalar_dense"] <= most
        assert calls.total() < 600
