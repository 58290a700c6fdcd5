"""Leading eigenvectors only, in the solver gram-f32: the same subspaces, and when it pays."""

import pytest
import torch
from reference import columns_for_energy
from spectra import lapack, planted, power_law, true_error

from prolora import truncated_svd
from prolora.core.ops import native
from prolora.core.svd import partial, solvers
from prolora.core.svd.tuning import TUNING


@pytest.fixture
def solved(monkeypatch):
    """The names of the solvers that ran."""
    if native.EXTENSION.kernels is None:
        pytest.skip("no compiled extension")
    names = []
    for module, name in ((partial, "tridiagonal_vectors"), (solvers, "_solve_stack")):
        monkeypatch.setattr(module, name, watch(names, name, getattr(module, name)))
    return names


def watch(names, name, call):
    def called(*args, **options):
        if args[0].shape[-1] >= TUNING.gram_rows:
            names.append(name)
        return call(*args, **options)

    return called


USUAL = power_law(400, 0.5)
SPECTRA = {
    "i^-0.5": (USUAL, 1, (520, 400)),
    "i^-0.7": (power_law(400, 0.7), 40, (400, 520)),
    "i^-1": (power_law(400, 1.0), 100, (520, 400)),
    "a head": (torch.cat([torch.tensor([30.0, 10.0, 5.0]), USUAL[:397]]), 0.5, (400, 520)),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_bound_holds_for_leading_vectors_alone(solved, name):
    values, rank, shape = SPECTRA[name]
    weight = planted(*shape, values)[0].float()
    basis = truncated_svd(weight, rank)
    assert basis.solver == "gram-f32" and basis.ok and solved == ["tridiagonal_vectors"]
    assert true_error(lapack(weight), basis) <= float(basis.bound) + 1e-6
    assert int(basis.rank) == (rank if rank >= 1 else columns_for_energy(weight, rank))


@pytest.mark.parametrize("rank", [200, 0.95])
def test_where_many_columns_are_asked_for_a_dense_solver_finds_all(solved, rank):
    weight = planted(400, 400, USUAL)[0].float()
    basis = truncated_svd(weight, rank)
    assert "tridiagonal_vectors" not in solved and "_solve_stack" in solved and basis.ok


def test_vectors_that_are_wrong_are_noticed_and_a_dense_solver_takes_over(solved, monkeypatch):
    weight = planted(400, 400, USUAL)[0].float()
    vectors = partial.tridiagonal_vectors
    for wrong in (
        lambda x: torch.cat([x[:, :1], x[:, :-1]], 1),
        lambda x: x * 1.01,
        lambda x: x * torch.nan,
        lambda x: x.flip(1),
    ):
        monkeypatch.setattr(partial, "tridiagonal_vectors", lambda *t, w=wrong: w(vectors(*t)))
        solved.clear()
        basis = truncated_svd(weight, 60)
        assert solved == ["tridiagonal_vectors", "_solve_stack"] and basis.ok
        assert true_error(lapack(weight), basis) <= float(basis.bound) + 1e-6


def test_without_the_extension_a_dense_solver_finds_all(solved, monkeypatch):
    monkeypatch.setattr(native, "EXTENSION", native.Choice(None, "a test"))
    native.serving.cache_clear()
    try:
        weight = planted(400, 400, USUAL)[0].float()
        assert truncated_svd(weight, 60).ok and solved == ["_solve_stack"]
    finally:
        monkeypatch.undo()
        native.serving.cache_clear()
