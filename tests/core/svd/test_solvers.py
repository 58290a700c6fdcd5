"""Stacks of symmetric eigenproblems: each matrix's result is checked, and stands alone."""

import pytest
import torch
from diagonal import pair_up

from prolora.core.svd import solvers

DTYPES = [torch.float32, torch.float64]
EIGH, EIGVALSH = torch.linalg.eigh, torch.linalg.eigvalsh


def make_stack(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return (x + x.mT).to(dtype)


def assert_values(symmetric, values):
    tolerance = 1e-4 if symmetric.dtype == torch.float32 else 1e-11
    expected = EIGVALSH(symmetric).flip(-1)
    torch.testing.assert_close(values, expected, rtol=0, atol=tolerance)


def assert_solved(symmetric, values, vectors):
    assert_values(symmetric, values)
    tolerance = 1e-4 if symmetric.dtype == torch.float32 else 1e-11
    rebuilt = (vectors * values[:, None]) @ vectors.mT
    torch.testing.assert_close(rebuilt, symmetric, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 40), (2, 150)])
def test_the_lower_triangle_alone_is_read(shape, dtype):
    symmetric = make_stack(*shape, dtype=dtype)
    given = symmetric.tril() + torch.full_like(symmetric, torch.nan).triu(1)
    kept = given.clone()
    assert_solved(symmetric, *solvers.descending_eigh(given))
    assert_values(symmetric, solvers.eigenvalue_stack(given))
    assert given.tril().equal(kept.tril())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_asks_for_no_scale(dtype):
    symmetric = make_stack(4, 20, dtype=dtype)
    scales = torch.tensor([0, 1e-30, 1, 1e30], dtype=dtype)[:, None]
    values, vectors = solvers.descending_eigh(symmetric * scales[..., None])
    wanted = EIGVALSH(symmetric).flip(-1)
    torch.testing.assert_close(values[1:] / scales[1:], wanted[1:], rtol=1e-4, atol=1e-4)
    assert not values[0].any() and vectors.isfinite().all()
    assert solvers.eigenvalue_stack(symmetric * scales[..., None]).isfinite().all()


def spoil_one_value(values, vectors):
    values[1, 2] = float("nan")


def repeat_one_vector(values, vectors):
    vectors[1, :, 3] = vectors[1, :, 2]


def repeat_one_pair(values, vectors):
    vectors[1, :, 3], values[1, 3] = vectors[1, :, 2], values[1, 2]


def mix_two_matrices(values, vectors):
    """Orthonormal, and right values: the vectors are those of another matrix."""
    vectors[1] = vectors[0]


def give_other_values(values, vectors):
    values[1] += 0.1 * abs(values[1]).max()


OF_VALUES = [spoil_one_value, give_other_values]
FAULTS = [*OF_VALUES, repeat_one_vector, repeat_one_pair, mix_two_matrices]


@pytest.mark.parametrize(("fault", "dtype"), pair_up(FAULTS, DTYPES))
@pytest.mark.parametrize("d", [9, 150])
def test_a_matrix_that_the_solver_gets_wrong_is_nan_and_the_others_are_right(
    monkeypatch, fault, dtype, d
):
    def eigh(a):
        values, vectors = EIGH(a)
        fault(values, vectors)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda a: eigh(a)[0])
    symmetric = make_stack(3, d, dtype=dtype)
    values, vectors = solvers.descending_eigh(symmetric)
    assert values[1].isnan().all() and vectors[1].isnan().all()
    assert_solved(symmetric[::2], values[::2], vectors[::2])
    if fault in OF_VALUES:
        values = solvers.eigenvalue_stack(symmetric)
        assert values.isnan().all(-1).tolist() == [False, True, False]


def test_a_matrix_with_nan_or_inf_is_nan_and_spares_the_others():
    symmetric = make_stack(4, 6)
    symmetric[0, 4, 1], symmetric[2, 0, 0], symmetric[3, 4, 1] = torch.nan, -torch.inf, torch.inf
    for values in (solvers.descending_eigh(symmetric)[0], solvers.eigenvalue_stack(symmetric)):
        assert values.isnan().all(-1).tolist() == [True, False, True, True]
