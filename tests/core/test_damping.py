"""The copy that gives way where the target has drifted."""

import pytest
import reference
import torch
from diagonal import pair_up
from hypothesis import given
from hypothesis import strategies as st
from spectra import related, weights

import prolora
from prolora import LowRank

SHAPES = [(24, 24), (40, 16), (16, 40), (1, 5), (5, 1)]


def case(m, n, rank=4, drift=0.4, seed=0, dtype=torch.float64):
    source = weights(m, n, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    up = torch.randn(m, rank, generator=generator).to(dtype)
    down = torch.randn(rank, n, generator=generator).to(dtype)
    return LowRank(up, down), source, related(source, drift, seed + 2).to(dtype)


@pytest.mark.parametrize(("shape", "kappa"), pair_up(SHAPES, [0.3, 4.0, 300.0]))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_it_equals_the_reference(shape, kappa, dtype, tolerance):
    delta, source, target = case(*shape, dtype=dtype)
    moved = prolora.damped(delta, source, target, kappa)
    wanted = reference.damp_dense(delta.dense(), source, target, kappa)
    assert moved.rank == delta.rank and moved.up.dtype == dtype
    assert (moved.dense().double() - wanted).norm() <= tolerance * delta.dense().double().norm()


def test_without_drift_or_without_damping_it_is_the_copy():
    delta, source, target = case(24, 32)
    for kappa, weight in ((0.0, target), (50.0, source)):
        moved = prolora.damped(delta, source, weight, kappa)
        torch.testing.assert_close(moved.dense(), delta.dense())


@given(seed=st.integers(0, 1000), kappa=st.floats(0, 1e6), drift=st.floats(0, 3))
def test_it_never_makes_an_update_longer(seed, kappa, drift):
    delta, source, target = case(12, 20, drift=drift, seed=seed)
    moved = prolora.damped(delta, source, target, kappa)
    assert moved.norm() <= delta.norm() * (1 + 1e-9)


def test_more_damping_leaves_less():
    delta, source, target = case(24, 24)
    norms = [float(prolora.damped(delta, source, target, k).norm()) for k in (0, 1, 4, 16, 64)]
    assert norms == sorted(norms, reverse=True) and norms[-1] < norms[0] / 2


def test_only_the_directions_that_drifted_are_weakened():
    """The drift has rank one: an update at right angles to it on both sides stays as it is."""
    source = torch.eye(8, dtype=torch.float64)
    target = source.clone()
    target[0, 0] += 5
    inside = LowRank(torch.eye(8).double()[:, :1], torch.eye(8).double()[:1])
    outside = LowRank(torch.eye(8).double()[:, 1:2], torch.eye(8).double()[2:3])
    assert prolora.damped(inside, source, target, 10.0).norm() < 1e-3
    torch.testing.assert_close(
        prolora.damped(outside, source, target, 10.0).dense(), outside.dense()
    )


def test_turning_both_models_turns_the_result():
    """No coordinate, no sign and no order of singular vectors matters."""
    delta, source, target = case(16, 24)
    left = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0]
    turned = prolora.damped(
        LowRank(left @ delta.up, delta.down @ right),
        left @ source @ right,
        left @ target @ right,
        4.0,
    )
    plain = prolora.damped(delta, source, target, 4.0)
    torch.testing.assert_close(turned.dense(), left @ plain.dense() @ right)


def test_a_stack_equals_its_members_and_may_have_a_kappa_each():
    cases = [case(20, 12, seed=seed) for seed in range(3)]
    kappas = torch.tensor([0.0, 2.0, 9.0], dtype=torch.float64)
    stack = prolora.damped(
        LowRank(torch.stack([c[0].up for c in cases]), torch.stack([c[0].down for c in cases])),
        torch.stack([c[1] for c in cases]),
        torch.stack([c[2] for c in cases]),
        kappas,
    )
    for i, (delta, source, target) in enumerate(cases):
        single = prolora.damped(delta, source, target, kappas[i].item())
        torch.testing.assert_close(stack.dense()[i], single.dense())


def test_half_precision_weights_and_a_source_of_zeros_are_taken():
    delta, source, target = case(16, 16, dtype=torch.float32)
    half = prolora.damped(delta, source.half(), target.half(), 4.0)
    torch.testing.assert_close(
        half.dense(), prolora.damped(delta, source, target, 4.0).dense(), atol=2e-2, rtol=2e-2
    )
    gone = prolora.damped(delta, torch.zeros(16, 16), target, 4.0)
    assert bool(gone.dense().isfinite().all())


@pytest.mark.parametrize("ours", [torch.float8_e4m3fn, torch.float16, torch.float64])
@pytest.mark.parametrize("theirs", [torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_weights_of_any_storage_dtype_are_taken(ours, theirs):
    delta, source, target = case(24, 40, dtype=torch.float32)
    source, target = source.to(ours), target.to(theirs)
    kept = source.clone(), target.clone()
    moved = prolora.damped(delta, source, target, 3.0)
    wanted = reference.damp_dense(delta.dense(), source.double(), target.double(), 3.0)
    assert (moved.dense().double() - wanted).norm() <= 1e-5 * wanted.norm()
    for weight, before in zip((source, target), kept, strict=True):
        assert torch.equal(weight.double(), before.double())


@pytest.mark.parametrize("kappa", [1e3, 1e5, 1e7])
def test_a_large_kappa_is_applied_as_given(kappa):
    """Beyond what float32 can factorise the work goes on in float64, instead of a smaller κ."""
    delta, source, target = case(40, 56, drift=2.0, dtype=torch.float32)
    target[:, 0] += 5 * source.norm()  # one direction drifted far more than the rest
    moved = prolora.damped(delta, source, target, kappa)
    wanted = reference.damp_dense(delta.dense(), source.double(), target.double(), kappa)
    assert moved.dtype == torch.float32
    assert (moved.dense().double() - wanted).norm() < 1e-4 * wanted.norm()


def test_weights_of_another_shape_are_refused():
    delta, source, target = case(16, 24)
    with pytest.raises(prolora.ShapeMismatch, match="target"):
        prolora.damped(delta, source, target.mT, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_of_zeros_without_drift_is_a_copy(dtype):
    delta, source, target = case(6, 8, dtype=dtype)
    both = [torch.stack([torch.zeros_like(w), w]) for w in (source, target)]
    stack = LowRank(*(torch.stack([x, x]) for x in (delta.up, delta.down)))
    moved = prolora.damped(stack, *both, 3.0)
    torch.testing.assert_close(moved.up[0], delta.up)
    torch.testing.assert_close(moved.down[0], delta.down)
    torch.testing.assert_close(moved.dense()[1], prolora.damped(delta, source, target, 3.0).dense())


@pytest.mark.parametrize("kappa", ["x", None, [1.0, "x"], -1.0, float("inf"), float("nan")])
def test_a_kappa_that_is_no_number_is_refused(kappa):
    delta, source, target = case(6, 8)
    with pytest.raises(ValueError, match="kappa must be"):
        prolora.damped(delta, source, target, kappa)
    with pytest.raises(prolora.ShapeMismatch, match="kappa is"):
        prolora.damped(delta, source, target, torch.ones(3))


@pytest.mark.parametrize("shape", [(8, 2048), (2048, 8)])
def test_an_oblong_weight_is_damped_in_float64_as_soon_as_its_longer_side_asks_for_it(shape):
    """κ is within float32 by the shorter side alone, and far beyond it by the longer one."""
    m, n = shape
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(m, n, generator=generator)
    left, right = (torch.randn(k, 1, generator=generator) for k in shape)
    drift = left @ right.mT + 1e-4 * torch.randn(m, n, generator=generator)
    delta = LowRank(torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator))
    target = source + drift
    limit = float(source.norm() ** 2 / drift.norm() ** 2) / (64 * torch.finfo(torch.float32).eps)
    kappa = 0.5 * limit / min(shape)
    moved = prolora.damped(delta, source, target, kappa)
    wanted = reference.damp_dense(delta.dense(), source.double(), target.double(), kappa)
    assert (moved.dense().double() - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-60, 2.0**60, 2.0**124])
def test_a_common_factor_of_both_weights_changes_nothing(scale):
    delta, source, target = case(16, 24, dtype=torch.float32)
    both = [torch.stack([w, w * scale]) for w in (source, target)]
    stack = LowRank(*(torch.stack([x, x]) for x in (delta.up, delta.down)))
    moved = prolora.damped(stack, *both, 3.0)
    plain = prolora.damped(delta, source, target, 3.0)
    for i in range(2):
        torch.testing.assert_close(moved.dense()[i], plain.dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("theirs", [3e38, -3e38, 1e-3])
def test_weights_near_the_end_of_float32_are_damped_as_float64_damps_them(theirs):
    delta, source, target = case(12, 20, dtype=torch.float32)
    source = source / source.abs().max() * 3e38
    target = target / target.abs().max() * theirs
    moved = prolora.damped(delta, source, target, 2.0)
    wanted = reference.damp_dense(delta.dense(), source.double(), target.double(), 2.0)
    assert (moved.dense().double() - wanted).norm() < 1e-4 * wanted.norm()
    projected = prolora.project(delta, source, target, method="damped", kappa=2.0)
    assert torch.equal(projected.up, moved.up)


def test_scaling_leaves_the_callers_weights_alone():
    delta, source, target = case(12, 20, dtype=torch.float32)
    for scale in (1.0, 1e35):
        ours, theirs = source * scale, target * scale
        before = ours.clone(), theirs.clone()
        prolora.damped(delta, ours, theirs, 2.0)
        assert torch.equal(ours, before[0]) and torch.equal(theirs, before[1])
