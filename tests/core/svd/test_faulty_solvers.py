"""A solver that fails or lies: the next solver takes over, or the result says that it is not ok."""

import re
import sys
from functools import cache

import pytest
import torch
from diagonal import pair_up
from spectra import (
    clusters,
    lapack,
    planted,
    power_law,
    rank_above,
    sine,
    spiked,
    steps,
    true_error,
)

from prolora import LowRank, truncated_svd
from prolora.core.exceptions import SolverFailure
from prolora.core.svd import partial, solvers, stacks
from prolora.errors import NonFiniteWeights

EIGH, SVD = torch.linalg.eigh, torch.linalg.svd


def raise_linalg(*args, **options):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def raise_runtime(*args, **options):
    raise RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")


@pytest.fixture(autouse=True)
def only_torchs_solvers(monkeypatch):
    """The faults of the solver tridiagonal are in test_tridiagonal_solver.py."""
    monkeypatch.setattr(partial, "solves_partially", lambda matrix: False)
    monkeypatch.setattr(sys.modules["prolora.core.basis"], "solves_sides", lambda w: False)


def work_as_a_gpu(monkeypatch, solver):
    """The solver gram-f32 runs on GPUs only."""
    if solver == "gram-f32":
        monkeypatch.setattr(stacks, "FORCE_BATCHED", True)


# Each takes values and vectors by descending value, and changes copies of them.
def repeat_a_leading_pair(values, vectors):
    vectors[..., 2], values[..., 2] = vectors[..., 1], values[..., 1]


def miss_the_first_pair(values, vectors):
    """The smallest pair comes twice instead."""
    for x in (values, vectors):
        x.copy_(torch.cat([x[..., 1:], x[..., -1:]], -1))


def give_noisy_vectors(values, vectors):
    vectors += 1e-2 * torch.randn_like(vectors) / vectors.shape[-1] ** 0.5


LIES = {
    "a leading vector twice": lambda values, vectors: vectors[..., 2].copy_(vectors[..., 1]),
    "a leading pair twice": repeat_a_leading_pair,
    "not the first pair": miss_the_first_pair,
    "one long vector": lambda values, vectors: vectors[..., 1].mul_(1.01),
    "long vectors": lambda values, vectors: vectors.mul_(1.01),
    "NaN in vectors": lambda values, vectors: vectors[..., 0, 0].fill_(torch.nan),
    "NaN in values": lambda values, vectors: values[..., 0].fill_(torch.nan),
    "noisy vectors": give_noisy_vectors,
}
FAULTS = LIES | {"LinAlgError": raise_linalg, "RuntimeError": raise_runtime}


def break_eigh(monkeypatch, fault, dtypes):
    def eigh(a, UPLO="L"):
        values, vectors = EIGH(a, UPLO=UPLO)
        if a.dtype not in dtypes or a.shape[-1] < 8:
            return values, vectors
        values, vectors = values.flip(-1), vectors.flip(-1)
        fault(values, vectors)
        return values.flip(-1), vectors.flip(-1)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


def break_svd(monkeypatch, fault):
    def svd(a, full_matrices=True):
        u, s, vt = SVD(a, full_matrices=full_matrices)
        fault(s, u)
        return u, s, vt

    monkeypatch.setattr(torch.linalg, "svd", svd)


@cache
def weight_of(case):
    """The weight of a case, and its singular vectors."""
    m, n, _ = CASES[case]
    weight = planted(m, n, power_law(min(m, n), 0.5))[0].float()
    return weight, lapack(weight)


# Name: (m, n, columns, the solver that works here).
CASES = {
    "krylov": (800, 800, 40),
    "gram-f32": (400, 440, 80),
    "gram-f64": (60, 80, 12),
    "gram-f64, all columns": (40, 40, 40),
}


@pytest.mark.parametrize(("fault", "solver"), pair_up(FAULTS, ["krylov", "gram-f32"]))
def test_where_the_float32_solver_fails_a_rung_in_float64_takes_over(monkeypatch, solver, fault):
    (weight, exact), k = weight_of(solver), CASES[solver][2]
    work_as_a_gpu(monkeypatch, solver)
    assert truncated_svd(weight, k).solver == solver
    break_eigh(monkeypatch, FAULTS[fault], {torch.float32})
    basis = truncated_svd(weight, k)
    assert basis.solver == "gram-f64" and basis.ok and true_error(exact, basis) <= basis.bound
    torch.testing.assert_close(basis.S, exact[1][:k].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("fault", "case"), pair_up(FAULTS, CASES))
def test_where_no_eigensolver_works_lapacks_svd_takes_over(monkeypatch, case, fault):
    (weight, exact), k = weight_of(case), CASES[case][2]
    work_as_a_gpu(monkeypatch, case)
    break_eigh(monkeypatch, FAULTS[fault], {torch.float32, torch.float64})
    basis = truncated_svd(weight, k)
    assert basis.ok and true_error(exact, basis) <= basis.bound
    assert basis.solver == "svd-f64"


@pytest.mark.parametrize("fault", LIES)
@pytest.mark.parametrize("case", ["gram-f64", "gram-f64, all columns"])
def test_where_every_solver_lies_the_result_says_that_it_is_not_ok(monkeypatch, case, fault):
    (weight, exact), k = weight_of(case), CASES[case][2]
    break_eigh(monkeypatch, LIES[fault], {torch.float32, torch.float64})
    break_svd(monkeypatch, LIES[fault])
    if fault.startswith("NaN"):
        with pytest.raises(SolverFailure, match="failed on finite numbers"):
            truncated_svd(weight, k)
        return
    basis = truncated_svd(weight, k)
    assert not basis.ok and basis.bound >= min(0.999, true_error(exact, basis))


@pytest.mark.parametrize("fault", [raise_linalg, raise_runtime])
def test_where_every_solver_raises_the_error_is_prolora_s_own(monkeypatch, fault):
    break_eigh(monkeypatch, fault, {torch.float32, torch.float64})
    monkeypatch.setattr(torch.linalg, "svd", fault)
    with pytest.raises(SolverFailure):
        truncated_svd(torch.randn(20, 30), 4)


def test_where_the_svd_fails_the_gram_matrix_answers_with_its_own_bound(monkeypatch):
    weight = planted(32, 32, 10.0 ** -torch.linspace(0, 10, 32, dtype=torch.float64))[0]
    assert truncated_svd(weight, 24).solver == "svd-f64"
    monkeypatch.setattr(torch.linalg, "svd", raise_linalg)
    basis = truncated_svd(weight, 24)
    assert basis.solver == "gram-f64" and not basis.ok
    assert basis.bound >= true_error(SVD(weight), basis)


def test_one_matrix_that_a_solver_fails_on_leaves_the_others_of_its_stack_alone(monkeypatch):
    stack = torch.stack([planted(20, 30, power_law(20, 0.5), seed)[0] for seed in range(3)])
    plain = truncated_svd(stack, 5)
    hard = stack[1] @ stack[1].mT

    def eigh(a, UPLO="L"):
        lower = hard.tril()
        if any(torch.allclose(one.tril(), lower) for one in a.reshape(-1, *a.shape[-2:])):
            raise_linalg()
        return EIGH(a, UPLO=UPLO)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    basis = truncated_svd(stack, 5)
    assert basis.solvers == ("gram-f64", "svd-f64", "gram-f64") and bool(basis.ok.all())
    for i in (0, 2):
        assert sine(plain.U[i], basis.U[i]) < 1e-12


def with_noise(size, orthonormal):
    """A solver of limited accuracy: each vector is off by `size`, at right angles or not."""

    def spoil(values, vectors):
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype)
        vectors += size * noise / vectors.shape[-1] ** 0.5
        if orthonormal:
            vectors.copy_(torch.linalg.qr(vectors)[0])

    return spoil


def give_unrelated_vectors(values, vectors):
    vectors.copy_(vectors.mT.clone())


def spoil_the_first_of_a_stack(values, vectors):
    if vectors.ndim > 2:
        vectors[0] = torch.eye(vectors.shape[-1])


QUALITIES = {
    "1e-5": with_noise(1e-5, False),
    "1e-5, orthonormal": with_noise(1e-5, True),
    "2e-4, orthonormal": with_noise(2e-4, True),  # about the worst that the check lets pass
    "1e-3": with_noise(1e-3, False),
    "1e-3, orthonormal": with_noise(1e-3, True),
    "unrelated vectors": give_unrelated_vectors,
    "one of a stack": spoil_the_first_of_a_stack,
}
LIMITED = ("1e-5", "1e-5, orthonormal", "2e-4, orthonormal")


# Name: (d, n, columns, singular values); the cut goes through a cluster, and among spikes.
STACKS = {
    "krylov": (768, 780, 24, [power_law(768, 0.5), steps(768, 24), rank_above(768, 24)]),
    "gram-f32": (
        *(400, 420, 80),
        [
            *(power_law(400, 0.5), power_law(400, 1.0), steps(400, 80)),
            *(clusters(400, 43, 1e-6), rank_above(400, 80), spiked(400, 400, 26, seed=1)),
        ],
    ),
}


@cache
def stack_of(solver):
    """A stack with a spectrum each, and its singular vectors."""
    d, n, _, spectra = STACKS[solver]
    stack = torch.stack([planted(d, n, x, seed)[0] for seed, x in enumerate(spectra)]).float()
    return stack, lapack(stack)


def check_quality(monkeypatch, solver, quality, whole_stacks):
    """The basis of a stack, none of whose bounds is below the error, or `ok` above the bound."""
    monkeypatch.setattr(stacks, "FORCE_BATCHED", whole_stacks)
    stack, exact = stack_of(solver)
    break_eigh(monkeypatch, QUALITIES[quality], {torch.float32})
    basis = truncated_svd(stack, STACKS[solver][2])
    for i in range(len(stack)):
        error = true_error([x[i] for x in exact], basis[i])
        assert error <= basis.bound[i] or basis.bound[i] >= 1
        assert basis.ok[i] == (basis.bound[i] <= 1e-3)
    return basis


@pytest.mark.parametrize(
    ("quality", "way"),
    pair_up(QUALITIES, [("gram-f32", True), ("krylov", True), ("krylov", False)]),
)
def test_no_quality_of_a_float32_solver_puts_the_bound_below_the_error(monkeypatch, way, quality):
    solver, whole_stacks = way
    basis = check_quality(monkeypatch, solver, quality, whole_stacks)
    assert basis.ok.all()
    partly = quality == "one of a stack" and whole_stacks  # the others keep their solver
    assert (solver in basis.solvers) == (quality in LIMITED or partly)


@pytest.mark.parametrize("rank", [48, 160])
def test_a_product_of_factors_is_cut_in_float64_where_float32_does_not_converge(monkeypatch, rank):
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(200, rank, generator=generator) for _ in range(2))
    update = LowRank(up, down.mT)
    wanted = LowRank(up.double(), down.mT.double()).truncate(3).dense().float()

    def svd(a, full_matrices=True):
        if a.dtype == torch.float32:
            raise_linalg()
        return SVD(a, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    found = update.truncate(3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.dense(), wanted, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(torch.linalg, "svd", raise_linalg)
    if rank > 128:
        with pytest.raises(SolverFailure, match="did not converge"):
            update.truncate(3)
        update.up[0, 0] = torch.nan
        with pytest.raises(NonFiniteWeights, match="thin factors"):
            update.truncate(3)


@pytest.mark.parametrize(
    ("solver", "quality"), pair_up(STACKS, ["1e-3, orthonormal", "unrelated vectors"])
)
def test_nor_where_nobody_checks_what_the_solver_gives(monkeypatch, solver, quality):
    measure = solvers._measure_pairs
    monkeypatch.setattr(solvers, "_measure_pairs", lambda *pairs: [0 * x for x in measure(*pairs)])
    check_quality(monkeypatch, solver, quality, whole_stacks=True)


@pytest.mark.parametrize(
    ("shape", "rank", "solver"),
    [
        ((768, 768), 32, "eigh"),
        ((384, 400), 64, "eigh"),
        ((40, 60), 8, "eigh"),
    ],
    ids=["krylov", "gram-f32", "gram-f64"],
)
def test_a_mistake_in_a_rung_or_too_little_memory_is_no_lack_of_convergence(
    monkeypatch, request, shape, rank, solver
):
    work_as_a_gpu(monkeypatch, request.node.callspec.id)
    for words in ("mat1 and mat2 shapes cannot be multiplied (3x4)", "can't allocate memory"):

        def mistaken(*args, words=words, **options):
            raise RuntimeError(words)

        monkeypatch.setattr(torch.linalg, solver, mistaken)
        monkeypatch.setattr(torch.linalg, "eigvalsh", mistaken)
        with pytest.raises(RuntimeError, match=re.escape(words)):
            truncated_svd(torch.randn(shape), rank)
