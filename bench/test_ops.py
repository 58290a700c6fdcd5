"""The native ops, each against its torch baseline in the same run.

    pytest bench/test_ops.py                    # tables of times
    pytest bench/test_ops.py --benchmark-disable  # once each, as a test

`extra_info["speedup"]` of an op is the baseline's time over its own, taken in alternation in the
same test; results are compared before they are timed.
"""

import statistics

import pytest
import torch
from timing import seconds

from prolora import ops

DTYPES = [torch.float32, torch.float64]
ROUNDS = 7


def torch_split_project(u, x):
    """torch.bmm pair: writes par, reads it again for perp."""
    par = torch.bmm(u, torch.bmm(u.mT, x))
    return par, x - par


def torch_overlap(us, ut):
    """Writes the ks x kt product."""
    return (us.mT @ ut).square().sum((1, 2))


def torch_svd(a):
    """One matrix after the other."""
    return torch.linalg.svd(a, full_matrices=False)


def compare(benchmark, ours, baseline, args):
    """Times `ours` by pytest-benchmark, and both in alternation for the ratio."""
    benchmark.extra_info["baseline"] = baseline.__doc__
    benchmark.extra_info["device"] = (
        torch.cuda.get_device_name() if args[0].is_cuda else f"{torch.get_num_threads()} threads"
    )
    benchmark.extra_info["isa"] = ops.cpu_isa()

    def timed():
        ours(*args)
        if args[0].is_cuda:
            torch.cuda.synchronize()

    if benchmark.enabled:
        seconds(ours, args), seconds(baseline, args)
        pairs = [(seconds(ours, args), seconds(baseline, args)) for _ in range(ROUNDS)]
        mine, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        benchmark.extra_info["ours_ms"] = round(1e3 * mine, 4)
        benchmark.extra_info["baseline_ms"] = round(1e3 * theirs, 4)
        benchmark.extra_info["speedup"] = round(theirs / mine, 3)
    benchmark(timed)


def random(shape, dtype, device):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return x.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(64, 64, 16, 8), (16, 320, 80, 16), (16, 1280, 320, 32), (2, 1280, 1280, 128)],
    ids=str,
)
@pytest.mark.parametrize("path", ["op", "kernel"])
def test_split_project(benchmark, device, path, shape, dtype):
    """path: what a user gets, which may be torch itself, or the kernel whatever the size."""
    b, m, k, r = shape
    u, x = random((b, m, k), dtype, device) / m**0.5, random((b, m, r), dtype, device)
    kernel = {
        "op": ops.split_project,
        "kernel": lambda u, x: ops.run_split_project(ops._C, u, x, u.is_cuda),
    }[path]
    for ours, theirs in zip(kernel(u, x), torch_split_project(u, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    compare(benchmark, kernel, torch_split_project, (u, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 16), (16, 1280, 320), (2, 1280, 1280)], ids=str)
def test_overlap(benchmark, device, shape, dtype):
    us, ut = random(shape, dtype, device), random(shape, dtype, device).flip(0)
    expected = torch_overlap(us.double(), ut.double())
    torch.testing.assert_close(ops.overlap(us, ut), expected, rtol=1e-4, atol=0)
    compare(benchmark, ops.overlap, torch_overlap, (us, ut))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("path", ["op", "kernel"])
def test_small_svd(benchmark, device, path, n, dtype):
    """path: as in test_split_project."""
    batch = {64: 512, 128: 256}.get(n, 2048 // n) if path == "op" else 2048 // n
    a = random((batch if benchmark.enabled else 4, n, n), dtype, device)
    kernel = {
        "op": ops.small_svd,
        "kernel": lambda a: ops.run_small_svd(ops._C, a, a.is_cuda),
    }[path]
    largest = 10 * n**0.5
    tolerance = n * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(kernel(a)[1], torch_svd(a)[1], rtol=0, atol=tolerance)
    compare(benchmark, kernel, torch_svd, (a,))
