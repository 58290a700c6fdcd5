"""The solver tridiagonal: its vectors are right, or are noticed and another solver takes over."""

import pytest
import torch
from spectra import lapack, planted, power_law, true_error

from prolora import project, truncated_svd
from prolora.core.ops import native
from prolora.core.reference import columns_for_energy
from prolora.core.svd import smaller_side

if native.EXTENSION.kernels is None:
    pytest.skip(f"no compiled extension: {native.EXTENSION.why}", allow_module_level=True)

USUAL = power_law(400, 0.5)
SPECTRA = {
    "i^-0.5": (USUAL, 1, (520, 400)),
    "i^-0.7": (power_law(400, 0.7), 40, (400, 520)),
    "i^-1": (power_law(400, 1.0), 100, (520, 400)),
    "three large": (torch.cat([torch.tensor([30.0, 10.0, 5.0]), USUAL[:397]]), 0.5, (400, 520)),
    "half of them": (USUAL, 200, (400, 400)),
    "nearly all": (USUAL, 0.99, (400, 400)),
    "all": (USUAL, 400, (400, 400)),
    "small": (power_law(60, 0.5), 0.9, (60, 80)),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_bound_holds(name):
    values, rank, shape = SPECTRA[name]
    weight = planted(*shape, values)[0].float()
    basis = truncated_svd(weight, rank)
    assert basis.solver == "tridiagonal" and basis.ok
    assert true_error(lapack(weight), basis) <= float(basis.bound)
    assert int(basis.rank) == (rank if rank >= 1 else columns_for_energy(weight, rank))


FAULTS = {
    "shifted": lambda rows: torch.cat([rows[:, :1], rows[:, :-1]], 1),
    "too long": lambda rows: rows * 1.01,
    "NaN": lambda rows: rows * torch.nan,
    "in another order": lambda rows: rows.flip(1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_vectors_are_noticed(monkeypatch, fault):
    source, target = (planted(400, 400, USUAL, seed)[0].float() for seed in range(2))
    update = torch.ones(400, 2), torch.ones(2, 400)
    right = project(update, source, target).dense()
    vectors = smaller_side.tridiagonal_vectors
    wrong = FAULTS[fault]
    monkeypatch.setattr(smaller_side, "tridiagonal_vectors", lambda *t: wrong(vectors(*t)))
    basis = truncated_svd(source, 60)
    assert basis.solver == "gram-f64" and basis.ok
    assert true_error(lapack(source), basis) <= float(basis.bound) + 1e-6
    moved, info = project(update, source, target, return_info=True)
    assert info.ok
    for result in (moved.dense(), project(update, source, target).dense()):
        assert float((result - right).norm()) <= 1e-5 * float(right.norm())


@pytest.mark.parametrize("fault", ["values", "reduction"])
def test_a_wrong_reduction_or_value_is_noticed(monkeypatch, fault):
    weight = planted(400, 400, USUAL)[0].float()
    if fault == "values":
        values = smaller_side.tridiagonal_values
        monkeypatch.setattr(smaller_side, "tridiagonal_values", lambda *t: values(*t) * 1.01)
    else:
        reduce = smaller_side.tridiagonalise

        def spoil(gram):
            reflections, scales, diagonal, beside = reduce(gram)
            return reflections, scales, diagonal * 1.001, beside

        monkeypatch.setattr(smaller_side, "tridiagonalise", spoil)
    basis = truncated_svd(weight, 60)
    assert basis.solver == "gram-f64" and basis.ok
    assert true_error(lapack(weight), basis) <= float(basis.bound) + 1e-6


def test_a_stack_sends_only_unproven_matrices_to_another_solver():
    usual = planted(24, 24, power_law(24, 0.5))[0].float()
    stack = torch.stack([usual, torch.eye(24)])  # the second has no gap at the cut
    basis = truncated_svd(stack, 8)
    assert basis.solvers[0] == "tridiagonal" and basis.solvers[1] != "tridiagonal"
    assert basis.ok.tolist() == [True, False]


def test_one_stack_may_keep_few_columns_of_one_matrix_and_leave_out_few_of_another():
    steep, level = (planted(24, 30, power_law(24, p), seed=p)[0].float() for p in (2, 0))
    stack, delta = torch.stack([steep, level]), torch.ones(2, 24, 30)
    together = project(delta, stack, stack, rank=0.9)
    for i in range(2):
        alone = project(delta[i], stack[i], stack[i], rank=0.9)
        assert float((together[i] - alone).norm()) <= 1e-5 * float(alone.norm())


def test_without_the_extension_lapack_does_the_work(monkeypatch):
    monkeypatch.setattr(native, "EXTENSION", native.Choice(None, "a test"))
    native.serving.cache_clear()
    try:
        weight = planted(400, 400, USUAL)[0].float()
        basis = truncated_svd(weight, 60)
        assert basis.ok and basis.solver == "gram-f64"
    finally:
        monkeypatch.undo()
        native.serving.cache_clear()
