"""What the package is called for, against the same in torch as its definition reads.

    pytest bench/test_calls.py                      # a table of times
    pytest bench/test_calls.py --benchmark-disable  # once each on small weights, as a test

`extra_info["speedup"]` is the baseline's time over ours, medians taken in alternation in the same
test; results are compared with float64 before they are timed. `svd_table.py` has more solvers and
spectra, `gpu.sh ours` the same calls on a GPU.
"""

import statistics
import time

import pytest
import torch
from spectra import planted, power_law

import prolora
from prolora.core.reference import leading_vectors, project_dense, subspace_overlap

ROUNDS = 3
SHAPES = [(640, 640, 128), (1280, 1280, 128), (1280, 2048, 320), (10240, 1280, 128)]


def seconds(call, arguments):
    """Seconds of the processor where it runs on one thread, which other load does not lengthen."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call(*arguments)
    return clock() - start


def compare(benchmark, ours, baseline, *arguments):
    """Times two ways in turns, each with its arguments as they are."""
    benchmark.extra_info["baseline"] = baseline.__doc__
    if benchmark.enabled:
        pairs = [(seconds(ours, arguments), seconds(baseline, arguments)) for _ in range(ROUNDS)]
        own, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        benchmark.extra_info |= {"ours_s": own, "baseline_s": theirs, "speedup": theirs / own}
    benchmark.pedantic(ours, arguments, rounds=1)


def torch_svd(weight, k):
    """torch.linalg.svd, cut to k columns: U and V."""
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :k], vh[:k].mT


@pytest.fixture(params=SHAPES, ids=lambda shape: "{}x{}, k={}".format(*shape))
def case(request, benchmark):
    """Two related weights [m, n] and k; an eighth of the size where nothing is timed."""
    m, n, k = request.param if benchmark.enabled else (size // 8 for size in request.param)
    source = planted(m, n, power_law(min(m, n), 0.5))[0].float()
    noise = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    return source, source + 0.1 * source.norm() / noise.norm() * noise, k


def test_truncated_svd(benchmark, case):
    weight, _, k = case
    basis, exact = prolora.truncated_svd(weight, k), leading_vectors(weight.double(), k)[0]
    missed = basis.U.double() - exact @ (exact.mT @ basis.U.double())
    assert basis.ok and float(torch.linalg.matrix_norm(missed, 2)) <= float(basis.bound)
    compare(benchmark, prolora.truncated_svd, torch_svd, weight, k)


def test_similarity(benchmark, case):
    source, target, k = case

    def ours(source, target):
        return prolora.similarity(source, target, rank=k)

    def baseline(source, target):
        """torch.linalg.svd of both weights, and the overlap of both sides."""
        sides = zip(torch_svd(source, k), torch_svd(target, k), strict=True)
        return [float(subspace_overlap(*side)) / k for side in sides]

    exact = baseline(source.double(), target.double())
    result = ours(source, target)
    assert [float(result.left), float(result.right)] == pytest.approx(exact, abs=1e-4)
    compare(benchmark, ours, baseline, source, target)


def test_project(benchmark, case):
    source, target, k = case
    m, n = source.shape
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(m, 8, generator=generator), torch.randn(8, n, generator=generator)

    def ours(source, target):
        return prolora.project((up, down), source, target, rank=k)

    def baseline(source, target):
        """torch.linalg.svd of both weights, and the equation of docs/method.md on the update."""
        (us, vs), (ut, vt) = torch_svd(source, k), torch_svd(target, k)
        delta = up @ down
        within = ut @ (ut.mT @ us @ (us.mT @ delta @ vs) @ (vs.mT @ vt)) @ vt.mT
        for left, right in ((us, vs), (ut, vt)):
            delta = delta - left @ (left.mT @ delta)
            delta = delta - (delta @ right) @ right.mT
        return within + delta

    exact = project_dense(up @ down, source.double(), target.double(), k, k, "prolora")
    for result in (ours(source, target).dense(), baseline(source, target)):
        assert float((result.double() - exact).norm() / exact.norm()) < 1e-3
    compare(benchmark, ours, baseline, source, target)
