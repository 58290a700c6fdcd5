"""The rows of small_batches.py as benchmarks: `project` and `truncated_svd` over lines of torch.

    pytest bench/test_small_batches.py                      # a table of times, all sizes
    pytest bench/test_small_batches.py --benchmark-disable  # once each at 64 x 64, as a test

`extra_info["ratio"]` is prolora's time over the baseline's, the minimum of each, taken in turns in
the same test. `python bench/small_batches.py` prints the same ratios and compares them with stored
ones.
"""

import time

import small_batches
import torch


def pytest_generate_tests(metafunc):
    # Small weights only if nothing is timed: those of all sizes take seconds to generate.
    largest = 64 if metafunc.config.getoption("benchmark_disable") else small_batches.LARGEST
    cases = {name: calls for name, *calls in small_batches.list_cases(largest)}
    metafunc.parametrize("calls", cases.values(), ids=cases)


def test_small_batches(benchmark, calls):
    ours, baseline = calls
    if benchmark.enabled:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        own, theirs = small_batches.time_in_turns((ours, baseline), clock, 2.0)
        benchmark.extra_info |= {"ours_s": own, "baseline_s": theirs, "ratio": own / theirs}
    else:
        baseline()
    benchmark.pedantic(ours, rounds=1)
