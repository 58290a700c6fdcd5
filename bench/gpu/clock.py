"""Times of what runs on a GPU, by its own events; by the host's clock where there is no GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

REPEATS = 20


def time_call(
    job: Callable[[], Any], device: str, repeats: int = REPEATS, limit: float = 10.0
) -> tuple[float, int]:
    """The median time of a call, and of how many calls it is the median.

    One call warms up. At least three are timed, and no more once `limit` seconds are over.
    """
    job()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - began < limit):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            job()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start_s = time.perf_counter()
            job()
            times.append(1e3 * (time.perf_counter() - start_s))
    return statistics.median(times), len(times)


def peak_memory(job: Callable[[], Any], device: str) -> int:
    """Bytes of the GPU's memory that a call has allocated at most; 0 on the CPU."""
    if device != "cuda":
        job()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
