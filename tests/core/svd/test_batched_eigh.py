"""One batched eigensolver for a stack: cuSOLVER's, played by a library on host memory, or none."""

import itertools
import logging
import threading

import pytest
import torch
from diagonal import pair_up
from fake_cusolver import EXECUTION_FAILED, INVALID_VALUE, FakeCusolver
from spectra import weights
from torch.utils._python_dispatch import TorchDispatchMode

from prolora import truncated_svd
from prolora.core.svd import batched_eigh, cusolver, solvers, stacks
from prolora.core.svd.batched_eigh import LOOP, StackSolver
from prolora.core.svd.cusolver import Cusolver, SolverUnavailable

DTYPES = [torch.float32, torch.float64]


def make_stack(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return (x + x.mT).to(dtype)


def use(monkeypatch, library):
    """Makes stacks on the CPU go through a fake library."""
    chosen = StackSolver("fake", Cusolver(library).solve)
    monkeypatch.setattr(solvers, "solver_at", lambda device, dtype, d: chosen)
    return library


def assert_values(symmetric, values):
    tolerance = 1e-4 if symmetric.dtype == torch.float32 else 1e-11
    expected = torch.linalg.eigvalsh(symmetric).flip(-1)
    torch.testing.assert_close(values, expected, rtol=0, atol=tolerance)


def assert_solved(symmetric, values, vectors):
    assert_values(symmetric, values)
    tolerance = 1e-4 if symmetric.dtype == torch.float32 else 1e-11
    rebuilt = (vectors * values[:, None]) @ vectors.mT
    torch.testing.assert_close(rebuilt, symmetric, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 40), (2, 150)])
def test_a_stack_is_one_call(monkeypatch, shape, dtype):
    library = use(monkeypatch, FakeCusolver())
    symmetric = make_stack(*shape, dtype=dtype)
    given = symmetric.tril() + torch.full_like(symmetric, torch.nan).triu(1)
    kept = given.clone()
    assert_solved(symmetric, *solvers.descending_eigh(given))
    assert_values(symmetric, solvers.eigenvalue_stack(given))
    assert library.calls == [shape[0]] * 2 and library.jobs == [1, 0]
    assert given.tril().equal(kept.tril())


def test_empty_stacks_and_stacks_in_other_layouts_are_solved(monkeypatch):
    use(monkeypatch, FakeCusolver())
    for shape in ((0, 4, 4), (2, 0, 0)):
        values, vectors = solvers.descending_eigh(torch.zeros(shape))
        assert values.shape == shape[:2] and vectors.shape == shape
    symmetric = make_stack(3, 12)
    assert_solved(symmetric, *solvers.descending_eigh(symmetric.mT))
    assert_solved(symmetric[::2], *solvers.descending_eigh(symmetric[::2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_asks_for_no_scale(monkeypatch, dtype):
    use(monkeypatch, FakeCusolver())
    symmetric = make_stack(4, 20, dtype=dtype)
    scales = torch.tensor([0, 1e-30, 1, 1e30], dtype=dtype)[:, None]
    values, vectors = solvers.descending_eigh(symmetric * scales[..., None])
    wanted = torch.linalg.eigvalsh(symmetric).flip(-1)
    torch.testing.assert_close(values[1:] / scales[1:], wanted[1:], rtol=1e-4, atol=1e-4)
    assert not values[0].any() and vectors.isfinite().all()
    assert solvers.eigenvalue_stack(symmetric * scales[..., None]).isfinite().all()


def spoil_info(values, rows, info):
    info[1] = 3


def spoil_one_value(values, rows, info):
    values[1, 2] = float("nan")


def repeat_one_vector(values, rows, info):
    rows[1, 3] = rows[1, 2]


def repeat_one_pair(values, rows, info):
    rows[1, 3], values[1, 3] = rows[1, 2], values[1, 2]


def mix_two_matrices(values, rows, info):
    """Orthonormal, and right values: the vectors are those of another matrix."""
    rows[1] = rows[0]


def give_other_values(values, rows, info):
    values[1] += 0.1 * abs(values[1]).max()


WRONG_VECTORS = [repeat_one_vector, mix_two_matrices]
FAULTS = [*WRONG_VECTORS, spoil_info, spoil_one_value, repeat_one_pair, give_other_values]


@pytest.mark.parametrize(("fault", "dtype"), pair_up(FAULTS, DTYPES))
@pytest.mark.parametrize("d", [9, 150])
def test_a_matrix_that_the_library_gets_wrong_is_nan_and_the_others_are_right(
    monkeypatch, fault, dtype, d
):
    use(monkeypatch, FakeCusolver(fault))
    symmetric = make_stack(3, d, dtype=dtype)
    values, vectors = solvers.descending_eigh(symmetric)
    assert values[1].isnan().all() and vectors[1].isnan().all()
    assert_solved(symmetric[::2], values[::2], vectors[::2])
    if fault not in (*WRONG_VECTORS, repeat_one_pair):
        values = solvers.eigenvalue_stack(symmetric)
        assert values.isnan().all(-1).tolist() == [False, True, False]


def test_a_matrix_with_nan_or_inf_is_nan_and_never_reaches_the_library(monkeypatch):
    seen = []
    use(monkeypatch, FakeCusolver(lambda values, rows, info: seen.append(values.copy())))
    symmetric = make_stack(4, 6)
    symmetric[0, 4, 1], symmetric[2, 0, 0], symmetric[3, 4, 1] = torch.nan, -torch.inf, torch.inf
    for values in (solvers.descending_eigh(symmetric)[0], solvers.eigenvalue_stack(symmetric)):
        assert values.isnan().all(-1).tolist() == [True, False, True, True]
    assert all(torch.as_tensor(values).isfinite().all() for values in seen)


@pytest.mark.parametrize("name", list(cusolver.SIGNATURES))
def test_where_a_call_fails_torch_takes_the_stack_and_the_log_says_so(monkeypatch, caplog, name):
    solvers._warn_once.cache_clear()
    use(monkeypatch, FakeCusolver(statuses={name: EXECUTION_FAILED}))
    symmetric = make_stack(3, 8)
    for _ in range(2):
        assert_solved(symmetric, *solvers.descending_eigh(symmetric))
    assert [name in record.message for record in caplog.records] == [True]
    assert_values(symmetric, solvers.eigenvalue_stack(symmetric))


def test_a_stack_beyond_the_limits_of_a_call_takes_several(monkeypatch):
    library = use(monkeypatch, FakeCusolver(largest=4))
    symmetric = make_stack(10, 6)
    monkeypatch.setattr(cusolver, "MOST_MATRICES", 4)
    assert_solved(symmetric, *solvers.descending_eigh(symmetric))
    assert library.calls == [4, 4, 2]
    monkeypatch.setattr(cusolver, "MOST_BYTES", 3 * 36 * 8)
    assert_solved(symmetric, *solvers.descending_eigh(symmetric))
    monkeypatch.setattr(cusolver, "MOST_BYTES", 10)
    assert_solved(symmetric, *solvers.descending_eigh(symmetric))
    assert library.calls[3:] == [3, 3, 3, 1, *[1] * 10]


def test_a_workspace_that_does_not_fit_shrinks_the_calls(monkeypatch):
    library = FakeCusolver()
    solver = Cusolver(library)
    whole = solver._solve_in_place

    def solve(session, rows, values, info, job):
        if len(rows) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        whole(session, rows, values, info, job)

    monkeypatch.setattr(solver, "_solve_in_place", solve)
    chosen = StackSolver("fake", solver.solve)
    monkeypatch.setattr(solvers, "solver_at", lambda device, dtype, d: chosen)
    symmetric = make_stack(7, 6)
    assert_solved(symmetric, *solvers.descending_eigh(symmetric))
    assert library.calls == [2, 2, 2, 1]
    monkeypatch.setattr(solver, "_solve_in_place", lambda *_: solve(None, range(3), 0, 0, 0))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        solvers.descending_eigh(symmetric)


@pytest.mark.parametrize(
    ("d", "rank", "rung"), [(768, 16, "krylov"), (400, 60, "gram-f32"), (60, 0.9, "gram-f64")]
)
def test_the_ladder_hands_the_library_whole_stacks(monkeypatch, d, rank, rung):
    monkeypatch.setattr(stacks, "CPU_AS_GPU", True)
    library = use(monkeypatch, FakeCusolver())
    weight = torch.stack([weights(d, d + 20, seed) for seed in range(3)])
    good = truncated_svd(weight, rank)
    assert good.rungs == (rung,) * 3 and set(library.calls) == {3}
    library.fault = lambda *results: len(results[0]) == 3 and mix_two_matrices(*results)
    mixed = truncated_svd(weight, rank)
    assert mixed.rungs[::2] == (rung,) * 2 and mixed.rungs[1] != rung
    library.statuses["cusolverDnXsyevBatched"] = EXECUTION_FAILED
    refused = truncated_svd(weight, rank)
    assert refused.rungs == good.rungs
    for basis in (mixed, refused):
        assert basis.ok.all() and basis.rank.equal(good.rank)
        torch.testing.assert_close(basis.S, good.S, rtol=1e-5, atol=1e-6)


class NoWait(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, and what it would have to send there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in (
            *("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"),
            *("_linalg_check_errors", "index", "masked_select", "randn", "lift_fresh"),
        ), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("d", [20, 150])
def test_the_host_never_waits_for_the_device(monkeypatch, d):
    use(monkeypatch, FakeCusolver(spoil_info))
    monkeypatch.setattr(stacks, "CPU_AS_GPU", True)
    symmetric = make_stack(3, d, dtype=torch.float32)
    solvers.estimate_skew(solvers.descending_eigh(symmetric)[1])  # makes the probes
    with NoWait():
        values, vectors = solvers.descending_eigh(symmetric)
        solvers.eigenvalue_stack(symmetric)
        solvers.estimate_skew(vectors)
    assert values[1].isnan().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: torch sees no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 200), (3, 20), (5, 130)])
def test_a_cuda_device_solves_a_stack_in_any_stream_without_waiting(shape, dtype):
    symmetric = make_stack(*shape, dtype=dtype)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_gpu = symmetric.cuda()
        solvers.descending_eigh(on_gpu)  # tries the solver out, and makes the probes
        batched = batched_eigh.solver_at(on_gpu.device, dtype, shape[-1]).solve is not None
        torch.cuda.set_sync_debug_mode("error" if batched else "default")
        try:
            results = solvers.descending_eigh(on_gpu), solvers.descending_eigh(on_gpu)
            alone = solvers.eigenvalue_stack(on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(x.equal(y) for x, y in zip(*results, strict=True))
        assert_solved(symmetric, *(x.cpu() for x in results[0]))
        assert_values(symmetric, alone.cpu())


def choose(monkeypatch, **candidates):
    monkeypatch.setattr(batched_eigh, "CANDIDATES", candidates)
    return batched_eigh.choose_solver(torch.device("cpu"), torch.float32)


def test_the_first_solver_that_solves_a_small_problem_is_chosen(monkeypatch):
    good = Cusolver(FakeCusolver())

    def missing():
        raise SolverUnavailable("not there")

    chosen = choose(monkeypatch, first=missing, second=lambda: good.solve, third=missing)
    assert (chosen.name, chosen.solve, chosen.why) == ("second", good.solve, "not there")
    for fault in FAULTS:
        bad = Cusolver(FakeCusolver(fault))
        chosen = choose(monkeypatch, bad=lambda bad=bad: bad.solve, good=lambda: good.solve)
        assert chosen.name == "good" and "random matrix" in chosen.why
    broken = Cusolver(FakeCusolver(statuses={"cusolverDnXsyevBatched_bufferSize": INVALID_VALUE}))
    chosen = choose(monkeypatch, broken=lambda: broken.solve)
    assert chosen.solve is None and chosen.name == LOOP and "returned status 3" in chosen.why


@pytest.fixture
def clock(monkeypatch):
    """Sets what a trial by time finds: seconds of the library and of torch."""

    def set_times(ours, theirs):
        trials = []

        def take_time(way, device):
            trials.append(way.args[0].shape)
            return theirs if way.func is torch.linalg.eigh else ours

        monkeypatch.setattr(batched_eigh, "take_time", take_time)
        batched_eigh.choose_by_time.cache_clear()
        return trials

    yield set_times
    batched_eigh.choose_by_time.cache_clear()


@pytest.mark.parametrize(
    ("theirs", "name"), [(0.1, LOOP), (0.5, LOOP), (0.51, "fake"), (2, "fake")]
)
def test_torch_takes_a_size_that_it_is_clearly_faster_at(monkeypatch, clock, theirs, name):
    solver = StackSolver("fake", Cusolver(FakeCusolver()).solve)
    monkeypatch.setattr(batched_eigh, "stack_solver", lambda device, dtype: solver)
    trials = clock(1.0, theirs)
    for d in (40, 64, 33, 65, 128):
        chosen = batched_eigh.solver_at(torch.device("cpu"), torch.float32, d)
        assert chosen.name == name and (chosen.solve is None) == (name == LOOP)
        assert name == "fake" or "against 1.0e+00 s of fake" in chosen.why
    # Once for sizes up to 64 and once for those up to 128.
    assert {shape[-1] for shape in trials} == {64, 128} and len(trials) <= 8


def give_nan(values, rows, info):
    values[:] = float("nan")


def not_converge(values, rows, info):
    info[:] = 1


@pytest.mark.parametrize(
    "library",
    [
        FakeCusolver(statuses={"cusolverDnXsyevBatched": EXECUTION_FAILED}),
        FakeCusolver(give_nan),
        FakeCusolver(not_converge),
    ],
    ids=["raises", "NaN", "info"],
)
def test_a_solver_that_fails_its_trial_by_time_gives_way_and_the_log_says_so(
    monkeypatch, clock, caplog, library
):
    solver = StackSolver("fake", Cusolver(library).solve)
    monkeypatch.setattr(batched_eigh, "stack_solver", lambda device, dtype: solver)
    clock(1.0, 9.0)
    symmetric = make_stack(2, 12)
    assert_solved(symmetric, *solvers.descending_eigh(symmetric))
    assert_values(symmetric, solvers.eigenvalue_stack(symmetric))
    assert ["fake fails at size 16" in record.message for record in caplog.records] == [True]


def test_whichever_is_chosen_a_stack_has_the_same_bounds(monkeypatch, clock):
    monkeypatch.setattr(stacks, "CPU_AS_GPU", True)
    solver = StackSolver("fake", Cusolver(FakeCusolver()).solve)
    monkeypatch.setattr(batched_eigh, "stack_solver", lambda device, dtype: solver)
    weight = torch.stack([weights(400, 420, seed) for seed in range(2)])
    bases = []
    for theirs in (0.1, 9.0):
        clock(1.0, theirs)
        bases.append([truncated_svd(weight, 60) for _ in range(2)])
    for first, second in bases:  # and each repeats bit for bit
        assert all(torch.equal(getattr(first, x), getattr(second, x)) for x in ("U", "S", "V"))
    (one, _), (other, _) = bases
    assert one.rungs == other.rungs and one.ok.all() and other.ok.all()
    torch.testing.assert_close(one.S, other.S, rtol=1e-6, atol=1e-6)


def test_a_stack_of_the_cpu_equals_its_members():
    symmetric = make_stack(3, 30)
    values, vectors = solvers.descending_eigh(symmetric)
    for i, one in enumerate(symmetric):
        pair = solvers.descending_eigh(one[None])
        assert values[i].equal(pair[0][0]) and vectors[i].equal(pair[1][0])
    assert all(a >= b for row in values for a, b in itertools.pairwise(row))


@pytest.mark.parametrize("name", list(cusolver.SIGNATURES))
def test_a_library_that_lacks_a_function_is_refused(name):
    with pytest.raises(SolverUnavailable, match=f"has no {name}$"):
        Cusolver(FakeCusolver(missing=[name]))


def test_threads_at_once_take_a_handle_each_and_later_calls_take_them_again(monkeypatch):
    both = threading.Barrier(2, timeout=20)
    library = use(monkeypatch, FakeCusolver(lambda *_: both.wait()))
    symmetric = make_stack(2, 6)
    for _ in range(2):
        threads = [threading.Thread(target=solvers.descending_eigh, args=[symmetric]) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert library.sessions == 2 and len(library.calls) == 4


def test_the_choice_is_made_once_for_a_device_and_a_dtype_and_logged(monkeypatch, caplog):
    made = []

    def choose_solver(device, dtype):
        made.append(dtype)
        return StackSolver(LOOP, None, "no library")

    monkeypatch.setattr(batched_eigh, "choose_solver", choose_solver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    batched_eigh.stack_solver.cache_clear()
    gpu = torch.device("cuda", 0)
    with caplog.at_level(logging.INFO):
        for dtype in (torch.float32, torch.float64, torch.float32):
            assert batched_eigh.stack_solver(gpu, dtype).solve is None
        assert batched_eigh.describe_solver() == f"{LOOP} (no library)"
    batched_eigh.stack_solver.cache_clear()
    assert made == DTYPES and len(caplog.records) == 2
    assert f"{LOOP} (no library)" in caplog.text
    assert batched_eigh.stack_solver(torch.device("cpu"), torch.float32).solve is None


def test_where_torch_has_loaded_no_cusolver_there_is_none(monkeypatch):
    if torch.version.cuda:
        pytest.skip("this torch has CUDA, and so brings a cuSOLVER")
    for name, open_solver in batched_eigh.CANDIDATES.items():
        if name.startswith("cuSOLVER"):
            with pytest.raises(SolverUnavailable, match="no libcusolver"):
                open_solver()
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(SolverUnavailable, match="ROCm"):
        batched_eigh.open_cusolver()


def test_the_library_is_found_in_the_memory_map(monkeypatch, tmp_path):
    lines = [
        "7f00-7f01 r-xp 00000000 08:01 12  /opt/my env/lib/libcusolver.so.11",
        "7f01-7f02 r--p 00001000 08:01 12  /opt/my env/lib/libcusolver.so.11",
        "7f02-7f03 r-xp 00000000 08:01 13  /opt/my env/lib/libcusolverMg.so.11",
        "7f03-7f04 rw-p 00000000 00:00 0   [heap]",
    ]
    maps = tmp_path / "maps"
    maps.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(cusolver, "Path", lambda path: maps)
    assert cusolver._mapped_libraries() == ["/opt/my env/lib/libcusolver.so.11"]
    maps.unlink()
    assert cusolver._mapped_libraries() == []
