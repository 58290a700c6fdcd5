"""Overlap of two weights' subspaces with its chance level, and their principal angles."""

import math

import numpy as np
import pytest
import torch
from dispatched import Calls
from spectra import basis_of, randn, related, weights

from prolora import principal_angles, project, similarity, truncated_svd
from prolora.core import angles, reference
from prolora.core.projectors import find_projectors
from prolora.core.subspaces import ANGLE_SHARES, angle_quantiles, basis_similarity
from prolora.core.svd import stacks
from prolora.errors import NonFiniteWeights, ShapeMismatch


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "whole stacks"])
def batched(request, monkeypatch):
    """As on a CPU, and as on a GPU."""
    monkeypatch.setattr(stacks, "FORCE_BATCHED", request.param)
    return request.param


def test_similarity_equals_the_dense_formula():
    source = weights(40, 60, seed=0)
    target = related(source, 0.3, seed=1)
    found = similarity(source, target, rank=10)
    exact = [reference.leading_vectors(w, 10) for w in (source, target)]
    for side, (us, ut) in zip((found.left, found.right), zip(*exact, strict=True), strict=True):
        assert side == pytest.approx(float(reference.subspace_overlap(us, ut)) / 10, abs=1e-6)
    assert found.chance_left == 10 / 40 and found.chance_right == 10 / 60
    assert found.above_left == pytest.approx(float((found.left - 0.25) / 0.75))
    with pytest.raises(ShapeMismatch, match="differ"):
        similarity(source, target.T, rank=2)


def test_wider_of_two_bases_sets_the_chance_level():
    source, target = weights(40, 60, seed=0), weights(40, 60, seed=1)
    narrow, wide = truncated_svd(source, 2), truncated_svd(target, 8)
    for pair in ((narrow, wide), (wide, narrow)):
        found = similarity(*pair, rank=5)  # of a Basis, which has its own rank
        assert (found.chance_left, found.chance_right) == (8 / 40, 8 / 60)
        shared = (narrow.U.mT @ wide.U).double().square().sum()
        assert found.left == pytest.approx(float(shared) / 2, abs=1e-6)
    inside = similarity(narrow, truncated_svd(source, 8), rank=5)
    assert inside.left == pytest.approx(1, abs=1e-6) == inside.above_left


def test_unrelated_weights_score_the_chance_level():
    stack = [torch.stack([weights(64, 64, seed=s + d) for s in range(8)]) for d in (0, 100)]
    found = similarity(*stack, rank=16)
    assert found.left.mean() == pytest.approx(0.25, abs=0.02)
    assert found.above_left.mean() == pytest.approx(0, abs=0.03)


def test_whole_spaces_say_nothing_and_the_above_chance_value_admits_it():
    found = similarity(weights(8, 8, 0), weights(8, 8, 1), rank=8)
    assert found.left == pytest.approx(1)
    assert math.isnan(found.above_left)


def test_similarity_and_account_print_their_main_numbers():
    source = weights(24, 36, 0)
    target = related(source, 0.3, 1)
    overlap = similarity(source, target, rank=6)
    assert repr(overlap) == (
        f"Similarity(left {overlap.left:.2f}, right {overlap.right:.2f}, by chance 0.25 and 0.17)"
    )
    _, info = project(source, source, target, return_info=True)
    assert repr(info).startswith("ProjectionInfo([24, 36], energy kept ") and len(repr(info)) < 100
    assert info.shape == (24, 36)


def test_account_says_how_three_axes_were_read():
    """They are a stack: of the update of a Conv1d [16, 8, 3] no [16, 24] is made."""
    delta, source, target = (torch.randn(16, 8, 3) for _ in range(3))
    _, info = project(delta, source, target, return_info=True)
    assert info.shape == (8, 3) and repr(info).startswith("ProjectionInfo(16 × [8, 3], ")
    flat, info = project(*(x.flatten(1) for x in (delta, source, target)), return_info=True)
    assert info.shape == flat.shape == (16, 24)


def orthonormal(b, m, k, seed=0):
    return torch.linalg.qr(randn(b, m, k, seed=seed))[0]


def planted(b, m, p, wanted):
    """Pairs of subspaces [b, m, p] and [b, m, q] with given angles, through random mixtures."""
    q = len(wanted)
    frame = orthonormal(b, m, p + q)
    x = frame[..., :p]
    y = x[..., :q] * wanted.cos() + frame[..., p:] * wanted.sin()
    mixed = x @ orthonormal(b, p, p, seed=1) * torch.arange(1, p + 1)
    return mixed, y @ orthonormal(b, q, q, seed=2)


def every_size(q):
    """Angles from 0 over 1e-13 to as close to a right one."""
    small = torch.logspace(-13, -0.2, q // 2, dtype=torch.float64)
    return torch.cat([torch.zeros(1).double(), small, math.pi / 2 - small.flip(0)])[:q]


@pytest.mark.parametrize(
    ("m", "p", "q"), [(60, 8, 8), (90, 30, 21), (300, 140, 100), (270, 132, 130), (20, 19, 1)]
)
def test_angles_of_every_size_are_exact(m, p, q, batched):
    """Small ones, large ones and more than 128 of them, beside the errors of the input itself."""
    exact = every_size(q).expand(2, q)
    x, y = planted(2, m, p, every_size(q))
    atol = 2e-13 if q <= 128 else 1e-12
    torch.testing.assert_close(principal_angles(x, y), exact, rtol=0, atol=atol)
    torch.testing.assert_close(principal_angles(y, x), exact, rtol=0, atol=atol)
    assert not batched or angles.angles_by_cholesky(x, y)[1].all()


@pytest.mark.parametrize("condition", [1e8, 1e12])
def test_columns_that_nearly_depend_on_each_other_span_what_they_span(condition, batched):
    frame, y = orthonormal(2, 60, 10), randn(2, 60, 7, seed=1)
    shrink = torch.logspace(0, -math.log10(condition), 10, dtype=torch.float64)
    x = frame * shrink @ orthonormal(2, 10, 10, seed=2)
    exact = angles.angles_by_reflections(frame, y)
    atol = 30 * condition * 2.0**-52
    torch.testing.assert_close(principal_angles(x, y), exact, rtol=0, atol=atol)
    assert not batched or angles.angles_by_cholesky(x, y)[1].all()


@pytest.mark.parametrize("scale", [1e-300, 1e250])
def test_no_scale_of_the_columns_matters(scale):
    x, y = randn(2, 30, 4), randn(2, 30, 3, seed=1)
    found = principal_angles(x * scale, y / scale)
    torch.testing.assert_close(found, principal_angles(x, y), rtol=0, atol=1e-14)


def test_missing_rank_is_noticed_and_spares_the_rest_of_the_stack():
    """A column twice, one of zeros, one that two others make."""
    x, y = randn(5, 30, 6), randn(5, 30, 4, seed=1)
    x[0, :, 3] = x[0, :, 2]
    x[1, :, 0] = 0
    y[2, :, 1] = y[2, :, 0] - 3 * y[2, :, 3]
    assert angles.angles_by_cholesky(x, y)[1].tolist() == [False, False, False, True, True]
    found = principal_angles(x, y)
    for i in range(5):
        alone = angles.angles_by_reflections(x[i : i + 1], y[i : i + 1])[0]
        torch.testing.assert_close(found[i], alone, rtol=0, atol=1e-13)


def test_matrices_that_a_solver_fails_on_are_done_again(monkeypatch):
    x, y = randn(3, 30, 6), randn(3, 30, 6, seed=1)
    source, target = basis_of(orthonormal(3, 30, 6)), basis_of(orthonormal(3, 30, 6, seed=1))
    expected, quantiles = principal_angles(x, y), angle_quantiles(source, target)
    solve = angles.small_singular_values

    def fail(a):
        return solve(a).index_fill(0, torch.tensor([len(a) - 1]), torch.nan)

    monkeypatch.setattr(angles, "small_singular_values", fail)
    torch.testing.assert_close(principal_angles(x, y), expected, rtol=0, atol=1e-14)
    for one, other in zip(angle_quantiles(source, target), quantiles, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_bases_need_not_be_orthonormal_and_numpy_stays_numpy():
    x = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    y = np.array([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    found = principal_angles(x, y)
    assert isinstance(found, np.ndarray) and np.abs(found).max() < 1e-14
    with pytest.raises(NonFiniteWeights, match="Y"):
        principal_angles(x, y * np.nan)


def in_16_bits(frame):
    """As a file of the basis cache holds it: whole numbers, each column with its scale."""
    step = frame.abs().amax(0) / 32767
    return ((frame / step).round() * step).float()


@pytest.mark.parametrize(
    ("columns", "bits"),
    [
        *(((10, 10), 64), ((10, 25), 32), ((25, 10), 16), ((40, 40), 32), ((40, 45), 64)),
        *(((60, 7), 16), ((9, 64), 64)),
    ],
)
def test_quantiles_are_those_of_all_angles_for_every_share_of_the_space(columns, bits, batched):
    """In less than half of the space and in more; as computed, and as kept in 16 bits."""
    noise, other = randn(2, 64, 64, seed=sum(columns))
    turned, frame = (torch.linalg.qr(x)[0] for x in (torch.eye(64).double() + 0.1 * noise, other))
    x, y = frame[:, : columns[0]], (turned @ frame)[:, : columns[1]]
    rounded = [{64: f, 32: f.float(), 16: in_16_bits(f)}[bits] for f in (x, y)]
    found, _ = angle_quantiles(*(basis_of(torch.stack([f, f])) for f in rounded))
    shares = torch.tensor(ANGLE_SHARES, dtype=torch.float64)
    expected = principal_angles(x, y).quantile(shares).expand(2, 5)
    tolerance = {64: 1e-7, 32: 1e-6, 16: 1e-3}[bits]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    # Products of a stack need not give equal matrices equal bits.
    torch.testing.assert_close(*found, rtol=0, atol=tolerance / 10 if batched else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_quantiles_of_a_stack_of_different_ranks_are_those_of_each_pair(dtype):
    """Fewer and more columns than half of the space, none, all of it, and either side the wider."""
    ranks = [3, 20, 12, 30, 0, 17], [5, 15, 25, 9, 4, 17]
    frames = [orthonormal(6, 30, 30).to(dtype), orthonormal(6, 30, 25, seed=1).to(dtype)]
    shares = torch.tensor([0, 0.3, 0.5, 1]).double()
    both = angle_quantiles(*map(basis_of, frames, ranks), shares.tolist())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-7
    for i, (p, q) in enumerate(zip(*ranks, strict=True)):
        if not p:
            assert both[0][i].isnan().all() and both[1][i].isnan().all()
            continue
        exact = principal_angles(frames[0][i, :, :p].double(), frames[1][i, :, :q].double())
        for side in both:
            torch.testing.assert_close(side[i], exact.quantile(shares), rtol=0, atol=tolerance)


def test_a_weight_of_zeros_has_no_angle():
    zero, some = truncated_svd(torch.zeros(1, 8, 8), 3), truncated_svd(torch.randn(1, 8, 8), 3)
    assert all(side.isnan().all() for side in angle_quantiles(zero, some))


@pytest.mark.parametrize("k", [12, 130])
def test_calls_and_waits_do_not_grow_with_the_stack(k, batched):
    """One wait for the angles of columns beside the two that look for NaN, one for quantiles."""
    if not batched:
        return
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


@pytest.mark.parametrize(("rank_source", "rank_target"), [(0.99, 0.99), (0.5, 0.99), (0.99, 0.4)])
@pytest.mark.parametrize("shape", [(48, 48), (40, 64)])
def test_projectors_have_the_angles_and_overlap_of_bases(shape, rank_source, rank_target):
    source = torch.stack([weights(*shape, seed) for seed in range(2)])
    target = torch.stack([related(w, 0.2, 7) for w in source])
    bases = truncated_svd(source, rank_source), truncated_svd(target, rank_target)
    pair = find_projectors([source], rank_source)[0], find_projectors([target], rank_target)[0]
    assert not bases[0].rank.equal(bases[1].rank) or rank_source == rank_target
    for one, other in zip(angle_quantiles(*pair), angle_quantiles(*bases), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    found, wanted = basis_similarity(*pair), basis_similarity(*bases)
    for name in ("left", "right", "chance_left", "chance_right"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-5)
