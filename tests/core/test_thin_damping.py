"""Damping from the thin factors: as good as the factorisation, or left to it."""

import pytest
import reference
import torch
from diagonal import pair_up
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples
from spectra import related, weights

from prolora import LowRank
from prolora.core import damping, thin_damping
from prolora.core.damping import Damper

SHAPES = [(320, 320), (256, 384), (384, 256)]


def make_case(m, n, rank, seed=0, drift="dense", size=0.15):
    generator = torch.Generator().manual_seed(seed)
    source = weights(m, n, seed=seed).float()
    target = related(source, size, seed + 1).float()
    if drift == "few":
        thin = torch.randn(m, 3, generator=generator) @ torch.randn(3, n, generator=generator)
        target = source + size * source.norm() * thin / thin.norm()
    if drift == "none":
        target = source.clone()
    up = torch.randn(m, rank, generator=generator)
    down = torch.randn(rank, n, generator=generator)
    return LowRank(up, down), source, target


def find_error(moved, case, kappa):
    delta, source, target = case
    wanted = reference.damp_dense(delta.dense(), source, target, kappa)
    return float((moved.dense().double() - wanted).norm() / delta.dense().double().norm())


@pytest.fixture(autouse=True, scope="module")
def small_sizes():
    """The iteration is tried at sizes that are fast to test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thin_damping, "ROUND", 0)
        patch.setattr(thin_damping, "USUAL_ROUNDS", 7)
        yield


@pytest.fixture
def no_factors(monkeypatch):
    """A factorisation is an error."""

    def refuse(*_):
        raise AssertionError("factorised")

    monkeypatch.setattr(damping, "_factorise_damping", refuse)


@pytest.mark.parametrize(("shape", "rank"), pair_up(SHAPES, [1, 4, 8]))
@pytest.mark.parametrize("drift", ["dense", "few", "none"])
def test_it_equals_the_dense_formula_without_a_factorisation(shape, rank, drift, no_factors):
    case = make_case(*shape, rank, drift=drift)
    damper = Damper(case[1], case[2], columns=rank)
    assert find_error(damper.at(1.0)(case[0]), case, 1.0) <= 1e-5


@settings(max_examples=examples(80), deadline=None)
@given(
    seed=st.integers(0, 1000),
    rank=st.integers(1, 12),
    kappa=st.floats(0, 1e4),
    size=st.floats(0, 2),
    drift=st.sampled_from(["dense", "few", "none"]),
)
def test_whatever_the_drift_the_result_is_right(seed, rank, kappa, size, drift):
    case = make_case(256, 320, rank, seed, drift, size)
    damper = Damper(case[1], case[2], columns=rank)
    # The factorisation in float32, to which hard cases are left, has its own rounding.
    assert find_error(damper.at(kappa)(case[0]), case, kappa) <= 1e-4


@pytest.mark.parametrize("kappa", [12.0, 50.0, 100.0, 400.0])
@pytest.mark.parametrize("size", [1.0, 2.0])
def test_float32_ends_before_it_shows(size, kappa):
    """A drift as large as the weights along few directions, where it erred by 1e-3."""
    case = make_case(256, 320, 2, 0, "few", size)
    damper = Damper(case[1], case[2], columns=2)
    assert find_error(damper.at(kappa)(case[0]), case, kappa) <= 1e-4


def test_what_does_not_converge_is_factorised(monkeypatch):
    case = make_case(320, 320, 8, size=0.8)
    monkeypatch.setattr(damping, "ROOM", 1)  # float64 would take this case before
    tried = []
    thin = damping.damp_thinly
    monkeypatch.setattr(damping, "damp_thinly", lambda *a: tried.append(thin(*a)) or tried[-1])
    damper = Damper(case[1], case[2], columns=8)
    moved = damper.at(50.0)(case[0])
    assert tried == [None]
    assert find_error(moved, case, 50.0) <= 1e-5


def test_an_estimate_that_is_too_good_is_found_out(monkeypatch):
    case = make_case(320, 320, 8)
    measured = []
    measure = thin_damping._measure_residual
    monkeypatch.setattr(thin_damping._Chain, "estimate_error", lambda self: 0.0)
    monkeypatch.setattr(
        thin_damping, "_measure_residual", lambda *a: measured.append(measure(*a)) or measured[-1]
    )
    moved = Damper(case[1], case[2], columns=8).at(2.0)(case[0])
    assert measured[0] > thin_damping.ALLOWED and len(measured) > 1
    assert find_error(moved, case, 2.0) <= 1e-5


def test_the_measured_residual_is_no_less_than_the_error(monkeypatch):
    """Where the iteration is stopped early, so that there is an error to see."""
    measured = []
    measure = thin_damping._measure_residual
    monkeypatch.setattr(thin_damping, "GOAL", 1e-2)
    monkeypatch.setattr(thin_damping, "ALLOWED", 1.0)
    monkeypatch.setattr(
        thin_damping, "_measure_residual", lambda *a: measured.append(measure(*a)) or measured[-1]
    )
    for seed in range(10):
        case = make_case(256, 384, 8, seed)
        moved = Damper(case[1], case[2], columns=8).at(2.0)(case[0])
        assert find_error(moved, case, 2.0) <= 2 * measured[-1]


def test_a_stack_equals_its_members_and_its_places():
    cases = [make_case(320, 256, 4, seed) for seed in range(4)]
    source, target = (torch.stack([case[i] for case in cases]) for i in (1, 2))
    delta = LowRank(*(torch.stack([getattr(c[0], f) for c in cases]) for f in ("up", "down")))
    damping_of_stack = Damper(source, target, columns=4).at(2.0)
    whole = damping_of_stack(delta)
    some = damping_of_stack(LowRank(delta.up[[1, 3]], delta.down[[1, 3]]), [1, 3])
    torch.testing.assert_close(some.dense(), whole.dense()[[1, 3]])
    for i, case in enumerate(cases):
        single = Damper(case[1], case[2], columns=4).at(2.0)(case[0])
        assert torch.equal(single.up, whole.up[i]) and torch.equal(single.down, whole.down[i])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_stays_so(bad):
    delta, source, target = make_case(320, 320, 4)
    delta.up[3, 1] = bad
    moved = Damper(source, target, columns=4).at(2.0)(delta)
    assert not bool(moved.dense().isfinite().all())


def test_an_update_of_zeros_and_one_of_equal_columns_are_taken(no_factors):
    delta, source, target = make_case(320, 320, 4)
    damper = Damper(source, target, columns=4)
    assert float(damper.at(2.0)(LowRank(delta.up * 0, delta.down)).norm()) == 0
    twice = LowRank(delta.up[:, [0, 0, 1, 1]].contiguous(), delta.down)
    assert find_error(damper.at(2.0)(twice), (twice, source, target), 2.0) <= 1e-5


def test_many_columns_are_left_to_the_factorisation():
    assert thin_damping.count_rounds((1280, 1280), 16) >= thin_damping.USUAL_ROUNDS
    assert thin_damping.count_rounds((1280, 1280), 320) == 0
    assert thin_damping.count_rounds((64, 64), 16) == 0
    assert thin_damping.count_rounds((1280, 1), 1) == 0
