"""The op that a CPU runs itself, against its torch baseline in the same run.

    pytest bench/test_ops.py                    # a table of times
    pytest bench/test_ops.py --benchmark-disable  # once each, as a test

`extra_info["speedup"]` is the baseline's time over the op's, taken in alternation in the same test;
results are compared before they are timed. `bench/gpu.sh ours` times every op on a GPU.
"""

import statistics
import time

import pytest
import torch

from prolora.core.ops import native
from prolora.core.ops.small_svd import small_svd

ROUNDS = 7


def torch_svd(a):
    """One matrix after the other."""
    return torch.linalg.svd(a, full_matrices=False)


def seconds(job, a):
    """Seconds of the processor where it runs on one thread, which other load does not lengthen."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    job(a)
    return clock() - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [8, 16, 32, 64, 128])
def test_small_svd(benchmark, n, dtype):
    """What a user gets, which may be torch itself."""
    batch = {64: 512, 128: 256}.get(n, 2048 // n) if benchmark.enabled else 4
    a = torch.randn(batch, n, n, dtype=dtype, generator=torch.Generator().manual_seed(0))
    tolerance = n * torch.finfo(dtype).eps * 10 * n**0.5
    torch.testing.assert_close(small_svd(a)[1], torch_svd(a)[1], rtol=0, atol=tolerance)
    benchmark.extra_info["baseline"] = torch_svd.__doc__
    benchmark.extra_info["device"] = f"{torch.get_num_threads()} threads"
    benchmark.extra_info["extension"] = native.EXTENSION.why or "compiled"
    if benchmark.enabled:
        seconds(small_svd, a), seconds(torch_svd, a)
        pairs = [(seconds(small_svd, a), seconds(torch_svd, a)) for _ in range(ROUNDS)]
        own, baseline = (statistics.median(times) for times in zip(*pairs, strict=True))
        benchmark.extra_info["ours_ms"] = round(1e3 * own, 4)
        benchmark.extra_info["baseline_ms"] = round(1e3 * baseline, 4)
        benchmark.extra_info["speedup"] = round(baseline / own, 3)
    benchmark(small_svd, a)
