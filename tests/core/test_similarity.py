"""Overlap with its chance level, and principal angles down to the smallest."""

import math

import numpy as np
import pytest
import reference
import torch
from spectra import basis_of, orthonormal, related, weights

from prolora import principal_angles, similarity, truncated_svd
from prolora.core.similarity import ANGLE_SHARES, angle_quantiles
from prolora.core.svd import stacks
from prolora.errors import NonFiniteWeights, ShapeMismatch


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "whole stacks"])
def both_ways(request, monkeypatch):
    """As on a CPU, and as on a GPU."""
    monkeypatch.setattr(stacks, "FORCE_BATCHED", request.param)


def test_similarity_equals_the_dense_formula():
    source = weights(40, 60, seed=0)
    target = related(source, 0.3, seed=1)
    found = similarity(source, target, rank=10)
    (us, vs), (ut, vt) = (
        reference.leading_vectors(source, 10),
        reference.leading_vectors(target, 10),
    )
    assert found.left == pytest.approx(float(reference.subspace_overlap(us, ut)) / 10, abs=1e-6)
    assert found.right == pytest.approx(float(reference.subspace_overlap(vs, vt)) / 10, abs=1e-6)
    assert found.chance_left == 10 / 40 and found.chance_right == 10 / 60


def test_unrelated_weights_score_the_chance_level():
    stack = [torch.stack([weights(64, 64, seed=s + d) for s in range(8)]) for d in (0, 100)]
    found = similarity(*stack, rank=16)
    assert found.left.mean() == pytest.approx(0.25, abs=0.02)
    assert found.above_left.mean() == pytest.approx(0, abs=0.03)


def test_whole_spaces_say_nothing_and_the_above_chance_value_admits_it():
    found = similarity(weights(8, 8, 0), weights(8, 8, 1), rank=8)
    assert found.left == pytest.approx(1)
    assert math.isnan(found.above_left)


def test_other_shapes_are_refused():
    with pytest.raises(ShapeMismatch, match="differ"):
        similarity(torch.randn(4, 5), torch.randn(5, 4), rank=2)


def test_angles_of_nan_are_refused_by_name():
    x = torch.eye(4)[:, :2]
    with pytest.raises(NonFiniteWeights, match="Y"):
        principal_angles(x, x * torch.nan)


def test_subspaces_of_different_dimension_have_as_many_angles_as_the_smaller():
    q = orthonormal(20, 6, torch.Generator().manual_seed(1))
    assert principal_angles(q[:, :5], q[:, 3:6]).tolist() == pytest.approx([0, 0, math.pi / 2])
    assert principal_angles(q[:, 3:6], q[:, :5]).tolist() == pytest.approx([0, 0, math.pi / 2])


def test_bases_need_not_be_orthonormal_and_numpy_stays_numpy():
    x = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    y = np.array([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    found = principal_angles(x, y)
    assert isinstance(found, np.ndarray)
    assert np.abs(found).max() < 1e-14


def test_planted_angles_from_1e_7_to_a_right_angle_are_found():
    planted = torch.tensor([1e-7, 1e-6, 1e-4, 1e-3, 0.03, 0.5, 1.0, 1.5], dtype=torch.float64)
    frame = torch.linalg.qr(torch.randn(60, 16, dtype=torch.float64))[0]
    x = frame[:, :8]
    y = x * planted.cos() + frame[:, 8:] * planted.sin()
    mix = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    found = principal_angles(x, y @ mix)
    torch.testing.assert_close(found, planted, rtol=1e-6, atol=1e-14)
    left, right = angle_quantiles(
        basis_of(x[None]), basis_of(y[None] @ mix), [i / 7 for i in range(8)]
    )
    torch.testing.assert_close(left[0], planted, rtol=1e-5, atol=1e-9)
    assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("columns", "bits"),
    [
        *(((10, 10), 64), ((10, 25), 32), ((25, 10), 16), ((40, 40), 32), ((40, 45), 64)),
        *(((60, 7), 16), ((9, 64), 64)),
    ],
)
def test_quantiles_are_those_of_all_angles_for_every_share_of_the_space(columns, bits):
    """In less than half of the space and in more; as computed, and as kept in 16 bits."""
    generator = torch.Generator().manual_seed(sum(columns))
    turned = torch.linalg.qr(
        torch.eye(64, dtype=torch.float64)
        + 0.1 * torch.randn(64, 64, dtype=torch.float64, generator=generator)
    )[0]
    frame = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=generator))[0]
    x, y = frame[:, : columns[0]], (turned @ frame)[:, : columns[1]]
    exact = principal_angles(x, y)
    rounded = [{64: f, 32: f.float(), 16: in_16_bits(f)}[bits] for f in (x, y)]
    found, _ = angle_quantiles(*(basis_of(torch.stack([f, f])) for f in rounded))
    expected = exact.quantile(torch.tensor(ANGLE_SHARES, dtype=torch.float64))
    tolerance = {64: 1e-7, 32: 1e-6, 16: 1e-3}[bits]
    assert found.shape == (2, 5)
    # Products of a stack need not give equal matrices equal bits.
    beside = tolerance / 10 if stacks.FORCE_BATCHED else 0
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=beside)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=tolerance)


def in_16_bits(frame):
    """As a file of the basis cache holds it: whole numbers, each column with its scale."""
    step = frame.abs().amax(0) / 32767
    return ((frame / step).round() * step).float()


def test_a_weight_of_zeros_has_no_angle():
    zero, some = truncated_svd(torch.zeros(1, 8, 8), 3), truncated_svd(torch.randn(1, 8, 8), 3)
    assert all(side.isnan().all() for side in angle_quantiles(zero, some))
