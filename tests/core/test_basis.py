"""truncated_svd: right on every spectrum, or flagged; and its bound never below the error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples
from spectra import planted, power_law, sine, weights

from prolora import project, truncated_svd
from prolora.core.svd import bounds
from prolora.core.svd.cut import make_even_cut
from prolora.errors import NonFiniteWeights, ShapeMismatch


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
    nothing = truncated_svd(torch.zeros(5, 7), 3)
    assert float(nothing.bound) == 0 and nothing.ok and int(nothing.rank) == 0


def test_a_spectrum_the_gram_matrix_cannot_resolve_goes_down_the_ladder():
    weight = planted(32, 32, 10.0 ** -torch.linspace(0, 10, 32, dtype=torch.float64))[0]
    assert truncated_svd(weight, 4).solver == "gram-f64"
    assert truncated_svd(weight, 24).solver == "svd-f64"


@pytest.mark.parametrize(("last", "solver"), [(1e-4, "gram-f64"), (1e-6, "svd-f64")])
def test_a_weak_last_column_is_as_exact_as_the_first(last, solver):
    """Of the Gram matrix, σ² = 1e-12 would have 4 digits."""
    weight, u, v = planted(24, 32, torch.tensor([1.0, last], dtype=torch.float64))
    basis = truncated_svd(weight, 2)
    assert basis.solver == solver and int(basis.rank) == 2 and basis.ok
    torch.testing.assert_close(basis.S, torch.tensor([1.0, last]).double(), rtol=1e-7, atol=0)
    for found, exact in ((basis.U, u), (basis.V, v)):
        assert sine(exact, found) <= min(float(basis.bound), 1e-7)
    delta = torch.linspace(-1, 1, 24 * 32).double().reshape(24, 32)
    inside = u @ u.mT @ delta @ v @ v.mT
    outside = delta - u @ u.mT @ delta
    outside = outside - outside @ v @ v.mT
    moved = project(delta, weight, weight, rank=2)
    assert (moved - inside - outside).norm() < 1e-7 * delta.norm()


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000), st.floats(0, 3))
@settings(max_examples=examples(120), deadline=None)
def test_errors_stay_below_the_bound_on_random_spectra_of_vectors_and_matrices(m, n, seed, power):
    d = min(m, n)
    weight, u, v = planted(m, n, power_law(d, power), seed)
    basis = truncated_svd(weight, 1 + seed % d)
    k = int(basis.rank)
    assert basis.U.shape == (m, 1 + seed % d) and basis.V.shape == (n, 1 + seed % d)
    error = max(sine(u[:, :k], basis.U[:, :k]), sine(v[:, :k], basis.V[:, :k]))
    assert error <= max(float(basis.bound), 1e-13)


def test_a_basis_moves_to_a_device_as_a_whole_and_casts_its_factors_only():
    basis = truncated_svd(weights(8, 8, 0), 3)
    moved = [x for x in basis.to("meta").__dict__.values() if isinstance(x, torch.Tensor)]
    assert len(moved) == 9 and all(x.is_meta for x in moved)
    cast = basis.to(torch.float64)
    assert cast.U.dtype == torch.float64 and cast.rank.dtype == torch.int64


@pytest.mark.parametrize("rank", [2, 0.9])
def test_a_stack_of_no_matrices_has_a_basis_of_none(rank):
    basis = truncated_svd(torch.zeros(0, 4, 5), rank)
    assert basis.U.shape == (0, 4, 1) and basis.bound.shape == (0,) and basis.solvers == ()


SENSELESS = [0, -1, 1.0, 0.0, 1.5, "3", True, np.int64(0), np.float32(1.5), np.bool_(True)]


def test_what_makes_no_sense_is_refused_by_name():
    for rank in SENSELESS:
        with pytest.raises(ValueError, match="rank must be"):
            truncated_svd(torch.eye(3), rank)
    for tol in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="tol must be"):
            truncated_svd(torch.eye(3), 2, tol=tol)
    with pytest.raises(ShapeMismatch):
        truncated_svd(torch.ones(5), 1)
    stack = torch.ones(3, 4, 5)
    stack[1, 2, 3] = torch.nan
    with pytest.raises(NonFiniteWeights, match=r"\[1\]"):
        truncated_svd(stack, 2)


def test_a_tolerance_of_zero_is_met_by_no_result_and_refused_by_none():
    weight = planted(400, 400, power_law(400, 0.5))[0].float()
    basis = truncated_svd(weight, 40, tol=0.0)
    assert not basis.ok and 0 < float(basis.bound) < 1e-3


def test_ties_at_the_cut_of_an_exact_rank_are_told_by_the_bound():
    values = power_law(350, 0.5)
    values[92:102] = values[92]
    basis = truncated_svd(planted(768, 768, values)[0].float(), 96)
    assert int(basis.rank) == 96 and not basis.ok


def test_where_krylov_proves_nothing_the_dense_factorisation_takes_over():
    """The cut lies inside a bulk without a gap worth the name."""
    values = torch.cat([torch.linspace(3, 2, 20), 1 + 1e-7 * torch.linspace(1, 0, 780)])
    weight, u, _ = planted(800, 800, values)
    basis = truncated_svd(weight, 40)
    assert basis.solver == "gram-f64"
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


def test_the_seed_decides_the_bits_and_the_same_call_gives_the_same():
    weight = weights(768, 780, 0)
    one, again, other = (truncated_svd(weight, 32, seed=seed) for seed in (0, 0, 1))
    assert one.solver == "krylov" and not torch.equal(one.U, other.U)
    assert all(torch.equal(getattr(one, x), getattr(again, x)) for x in ("U", "S", "V", "bound"))
    strict = truncated_svd(weight[:40, :50], 8, tol=1e-9)  # float32 factors are not as exact
    assert not strict.ok and strict.bound <= 1e-3


def test_a_weight_of_any_scale_has_values_of_its_scale():
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


def test_a_basis_prints_how_it_was_made_and_how_good_it_is():
    basis = truncated_svd(weights(64, 48, 0).double(), 8)
    text = repr(basis)
    assert text.startswith("Basis(64×48, rank 8, float64, gram-f64, bound ") and len(text) < 70
    assert "bound ?" in repr(basis.to("meta"))
    several = truncated_svd(torch.stack([torch.eye(5), torch.ones(5, 5)]), 4)
    assert "2 of 5×5, rank 1 to 4" in repr(several)
