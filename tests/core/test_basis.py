"""truncated_svd: right on every spectrum, or flagged; and its bound never below the error."""

import numpy as np
import pytest
import torch
from diagonal import pair_up
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples
from spectra import orthonormal, planted, power_law, sine, weights

from prolora import truncated_svd
from prolora.core.svd import bounds
from prolora.core.svd.cut import make_even_cut
from prolora.errors import NonFiniteWeights, ShapeMismatch

ZOO = {
    "i^-0.5": power_law(48, 0.5),
    "i^-1": power_law(48, 1.0),
    "steps": torch.tensor([4.0] * 8 + [1.0] * 40),
    "clusters": torch.cat([3 + 1e-3 * torch.rand(8), 1 + 1e-3 * torch.rand(40)]),
    "geometric": 0.5 ** torch.arange(48.0),
    "graded beyond float32": 10.0 ** -torch.arange(0, 12, 0.25),
    "rank 8": torch.tensor([1.0] * 8 + [0.0] * 40),
    "tiny": 1e-30 * power_law(48, 0.5),
    "huge": 1e30 * power_law(48, 0.5),
    "repeated at the cut": torch.tensor([2.0] * 4 + [1.0] * 44),
}


@pytest.mark.parametrize(("name", "shape"), pair_up(ZOO, [(48, 48), (48, 80), (80, 48)]))
def test_the_bound_is_never_below_the_error(name, shape):
    weight, u, v = planted(*shape, ZOO[name])
    k = 8
    basis = truncated_svd(weight, k)
    used = int(basis.rank)
    error = max(sine(u[:, :used], basis.U[:, :used]), sine(v[:, :used], basis.V[:, :used]))
    assert basis.bound >= error or error < 1e-14
    if name == "repeated at the cut":
        assert basis.bound == 1 and not basis.ok
    else:
        assert basis.ok and error < 1e-3


def test_energy_picks_the_fewest_columns_that_hold_it():
    values = torch.tensor([3.0, 2.0, 1.0, 1.0])  # squares 9 4 1 1 of 15
    weight = planted(6, 4, values)[0]
    assert int(truncated_svd(weight, 0.5).rank) == 1
    assert int(truncated_svd(weight, 0.8).rank) == 2
    assert int(truncated_svd(weight, 0.9).rank) == 3
    assert int(truncated_svd(torch.eye(4), 0.5).rank) == 2  # exactly
    assert truncated_svd(weight, 0.8).energy == pytest.approx(13 / 15)


def test_no_direction_is_made_up_for_a_rank_deficient_weight():
    weight = planted(20, 30, torch.tensor([1.0, 0.5, 0.25]))[0]
    basis = truncated_svd(weight, 10)
    assert int(basis.rank) == 3
    assert int(truncated_svd(torch.zeros(5, 4), 3).rank) == 0
    assert truncated_svd(torch.zeros(5, 4), 3).ok


def test_a_spectrum_the_gram_matrix_cannot_resolve_goes_down_the_ladder():
    weight = planted(32, 32, 10.0 ** -torch.linspace(0, 10, 32, dtype=torch.float64))[0]
    assert truncated_svd(weight, 4).rung == "gram-f64"
    assert truncated_svd(weight, 24).rung == "svd-f64"


def test_the_same_call_gives_the_same_bits():
    weight = weights(50, 50, seed=3)
    first, second = truncated_svd(weight, 10), truncated_svd(weight, 10)
    assert torch.equal(first.U, second.U) and torch.equal(first.V, second.V)


@pytest.mark.parametrize("m, n", [(1, 1), (1, 7), (7, 1)])
def test_vectors_and_scalars_are_matrices_too(m, n):
    basis = truncated_svd(torch.randn(m, n), 3)
    assert basis.U.shape == (m, 1) and basis.V.shape == (n, 1)
    assert basis.bound < 1e-6


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000), st.floats(0, 3))
@settings(max_examples=examples(120), deadline=None)
def test_projector_errors_stay_below_the_bound_on_random_spectra(m, n, seed, exponent):
    d = min(m, n)
    weight, u, _ = planted(m, n, power_law(d, exponent), seed)
    k = 1 + seed % d
    basis = truncated_svd(weight, k)
    used = int(basis.rank)
    probe = orthonormal(m, 1, torch.Generator().manual_seed(seed))
    exact = u[:, :used] @ (u[:, :used].mT @ probe)
    ours = basis.U @ (basis.U.mT @ probe)
    assert (exact - ours).norm() <= max(float(basis.bound), 1e-13)


def test_a_basis_moves_to_a_device_as_a_whole_and_casts_its_factors_only():
    basis = truncated_svd(weights(8, 8, 0), 3)
    moved = [x for x in basis.to("meta").__dict__.values() if isinstance(x, torch.Tensor)]
    assert len(moved) == 9 and all(x.is_meta for x in moved)
    cast = basis.to(torch.float64)
    assert cast.U.dtype == torch.float64 and cast.rank.dtype == torch.int64


@pytest.mark.parametrize("rank", [2, 0.9])
def test_a_stack_of_no_matrices_has_a_basis_of_none(rank):
    basis = truncated_svd(torch.zeros(0, 4, 5), rank)
    assert basis.U.shape == (0, 4, 1) and basis.bound.shape == (0,) and basis.rungs == ()


def test_nan_names_the_matrix():
    stack = torch.randn(3, 4, 5)
    stack[1, 2, 3] = torch.nan
    with pytest.raises(NonFiniteWeights, match=r"\[1\]"):
        truncated_svd(stack, 2)


@pytest.mark.parametrize(
    "rank", [0, -1, 1.0, 0.0, 1.5, "3", True, np.int64(0), np.float32(1.5), np.bool_(True)]
)
def test_a_rank_that_makes_no_sense_is_refused(rank):
    with pytest.raises(ValueError, match="rank must be"):
        truncated_svd(torch.eye(3), rank)


@pytest.mark.parametrize("tol", [-1.0, float("nan")])
def test_a_tolerance_that_makes_no_sense_is_refused(tol):
    with pytest.raises(ValueError, match="tol must be"):
        truncated_svd(torch.eye(3), 2, tol=tol)


def test_a_vector_is_no_weight():
    with pytest.raises(ShapeMismatch):
        truncated_svd(torch.ones(5), 1)


# --- The Krylov rung: few columns of a large matrix.

LARGE = {
    "i^-0.5": power_law(800, 0.5),
    "i^-1": power_law(800, 1.0),
    "spikes on a flat bulk": torch.cat(
        [
            torch.linspace(3, 2, 40),
            1 + 0.2 * torch.rand(760, generator=torch.Generator().manual_seed(0)),
        ]
    ),
}


@pytest.mark.parametrize(
    ("name", "shape"), list(zip(LARGE, [(800, 800), (800, 1000), (1000, 800)], strict=True))
)
def test_krylov_finds_the_planted_subspace_and_bounds_its_error(name, shape):
    weight, u, v = planted(*shape, LARGE[name].sort(descending=True)[0])
    basis = truncated_svd(weight.float(), 40)
    assert basis.rung == "krylov"
    error = max(sine(u[:, :40], basis.U), sine(v[:, :40], basis.V))
    assert error <= basis.bound <= 1e-3
    values = LARGE[name].sort(descending=True)[0][:40].float()
    torch.testing.assert_close(basis.S, values, rtol=1e-5, atol=0)


def test_a_tolerance_of_zero_is_met_by_no_result_and_refused_by_none():
    weight = planted(800, 800, LARGE["i^-0.5"])[0].float()
    basis = truncated_svd(weight, 40, tol=0.0)
    assert not basis.ok and 0 < float(basis.bound) < 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_ties_at_the_cut_of_an_exact_rank_are_told_by_the_bound(seed):
    values = power_law(350, 0.5)
    values[92:102] = values[92]
    basis = truncated_svd(planted(768, 768, values, seed)[0].float(), 96)
    assert int(basis.rank) == 96 and not basis.ok


def test_where_krylov_proves_nothing_the_dense_factorisation_takes_over():
    """The cut lies inside a bulk without a gap worth the name."""
    values = torch.cat([torch.linspace(3, 2, 20), 1 + 1e-7 * torch.linspace(1, 0, 780)])
    weight, u, _ = planted(800, 800, values)
    basis = truncated_svd(weight, 40)
    assert basis.rung == "gram-f64"
    assert sine(u[:, :40], basis.U) <= basis.bound


@pytest.mark.parametrize(("shape", "k"), [((400, 420), 150), ((420, 400), 40), ((768, 780), 32)])
def test_residual_and_gap_are_those_of_the_factors(shape, k):
    weight = planted(*shape, power_law(min(shape), 0.5))[0].float()
    basis, w = truncated_svd(weight, k), weight.double()
    u, s, v = (x.double() for x in (basis.U, basis.S, basis.V))
    left = torch.maximum((w @ v - u * s).norm(), (w.mT @ u - v * s).norm()) / w.norm()
    assert left <= 1.05 * basis.residual <= 5 * left
    exact = torch.linalg.svdvals(w)
    assert float(basis.gap) == pytest.approx(float(1 - exact[k] / exact[k - 1]), rel=1e-4)
    assert u.shape == (shape[0], k) and v.shape == (shape[1], k)


def test_the_seed_decides_the_bits_and_a_tolerance_what_is_ok():
    weight = weights(768, 780, 0)
    one, other = truncated_svd(weight, 32), truncated_svd(weight, 32, seed=1)
    assert one.rung == "krylov" and not torch.equal(one.U, other.U)
    strict = truncated_svd(
        weight[:40, :50], 8, tol=0.5 * float(truncated_svd(weight[:40, :50], 8).bound)
    )
    assert not strict.ok and strict.bound <= 1e-3


def test_zero_weights_have_no_direction_and_scales_come_back():
    nothing = truncated_svd(torch.zeros(5, 7), 3)
    assert float(nothing.bound) == 0 and nothing.ok and int(nothing.rank) == 0
    weight = weights(40, 50, 0).double()
    large = truncated_svd(weight * 2.0**600, 8)
    torch.testing.assert_close(large.S / 2.0**600, truncated_svd(weight, 8).S)


def test_what_couples_kept_and_dropped_vectors_counts_in_a_bound():
    """Of [[2, 0.5], [0.5, 1]] behind the cut, and with half of every error fed back."""
    x = torch.eye(3).double()[None, :2]
    theta, squares = torch.tensor([[5.0, 2.0]]).double(), torch.tensor([[0.0, 0.25]]).double()
    pairs = bounds.Pairs(x, theta, x, squares, torch.zeros(1).double())
    cut = make_even_cut(torch.zeros(1, 3, 3), 1, 1)
    above = bounds.bound_dropped(pairs, torch.ones(1).double(), cut)
    assert float(above) >= float(torch.linalg.eigvalsh(torch.tensor([[2.0, 0.5], [0.5, 1.0]]))[1])
    half, far = torch.full((1,), 0.5).double(), torch.ones(1, 1).double()
    assert float(bounds.bound_span_angle(half / 5, half, far)) == pytest.approx(0.2)
