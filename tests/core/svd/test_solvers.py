"""Stacks of symmetric eigenproblems: each matrix's result is checked, and stands alone."""

import pytest
import torch
from spectra import randn

from prolora.core.svd.solvers import descending_eigh, eigenvalue_stack

EIGH, EIGVALSH = torch.linalg.eigh, torch.linalg.eigvalsh
either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def make_stack(*shape, dtype=torch.float64):
    x = randn(*shape, shape[-1])
    return (x + x.mT).to(dtype)


def assert_solved(symmetric, values, vectors):
    tolerance = 1e-4 if symmetric.dtype == torch.float32 else 1e-11
    torch.testing.assert_close(values, EIGVALSH(symmetric).flip(-1), rtol=0, atol=tolerance)
    rebuilt = (vectors * values[:, None]) @ vectors.mT
    torch.testing.assert_close(rebuilt, symmetric, rtol=0, atol=tolerance)


@either_dtype
def test_the_check_asks_for_no_scale(dtype):
    """And the lower triangle alone is read."""
    symmetric = make_stack(4, 20, dtype=dtype)
    scales = torch.tensor([0, 1e-30, 1, 1e30], dtype=dtype)[:, None]
    given = symmetric.tril() * scales[..., None] + torch.full_like(symmetric, torch.nan).triu(1)
    wanted = EIGVALSH(symmetric).flip(-1)[1:]
    values, vectors = descending_eigh(given)
    assert not values[0].any() and vectors.isfinite().all()
    for found in (values, eigenvalue_stack(given)):
        torch.testing.assert_close(found[1:] / scales[1:], wanted, rtol=1e-4, atol=1e-4)


def repeat_one_pair(values, vectors):
    vectors[1, :, 3], values[1, 3] = vectors[1, :, 2], values[1, 2]


def mix_two_matrices(values, vectors):
    """Orthonormal, and right values: the vectors are those of another matrix."""
    vectors[1] = vectors[0]


def give_other_values(values, vectors):
    values[1] += 0.1 * abs(values[1]).max()


@either_dtype
@pytest.mark.parametrize("fault", [repeat_one_pair, mix_two_matrices, give_other_values])
def test_a_matrix_that_the_solver_gets_wrong_is_nan_and_the_others_are_right(
    monkeypatch, fault, dtype
):
    def eigh(a):
        values, vectors = EIGH(a)
        fault(values, vectors)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda a: eigh(a)[0])
    symmetric = make_stack(3, 150, dtype=dtype)
    values, vectors = descending_eigh(symmetric)
    assert values[1].isnan().all() and vectors[1].isnan().all()
    assert_solved(symmetric[::2], values[::2], vectors[::2])
    if fault is give_other_values:
        assert eigenvalue_stack(symmetric).isnan().all(-1).tolist() == [False, True, False]


def test_a_matrix_with_nan_or_inf_is_nan_and_spares_the_others():
    symmetric = make_stack(4, 6)
    symmetric[0, 4, 1], symmetric[2, 0, 0], symmetric[3, 4, 1] = torch.nan, -torch.inf, torch.inf
    for values in (descending_eigh(symmetric)[0], eigenvalue_stack(symmetric)):
        assert values.isnan().all(-1).tolist() == [True, False, True, True]
