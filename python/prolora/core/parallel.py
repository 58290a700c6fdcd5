"""Independent matrices over the cores of the CPU, one core each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Barrier, Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

In = TypeVar("In")
Out = TypeVar("Out")

# A matrix with fewer entries is multiplied on one thread: 512 x 512.
PARALLEL_ENTRIES = 1 << 18


def map_on_threads(job: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """Computes [job(item) for item in items] on torch's number of threads.

    LAPACK's threads spend much of their time waiting for each other at the sizes of diffusion
    weights; whole matrices in parallel do not. torch releases the GIL inside its operators. A
    result does not depend on its thread.

    Items that hold tensors on a GPU go one after the other, in the caller's stream: another thread
    would start in the default stream, before what the caller has queued is done, and several at
    once would take several times the memory.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    if workers <= 1 or not all(_is_on_cpu(item) for item in items):
        return [job(item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def alone(item: In) -> Out:
        # Kept by each thread for itself.
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            return job(item)

    pool = _find_pool(workers, threads // workers)
    futures = [pool.submit(alone, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # what a failure leaves behind works on the caller's tensors


@contextmanager
def limit_threads(entries: int) -> Iterator[None]:
    """Runs torch on one thread if the largest matrix has few entries, for the calling thread.

    OpenMP's other threads spin while they wait for work. On two cores `prolora demo`, whose largest
    matrix is 576 x 96, took 316 CPU seconds and 209 s with two threads, and 153 CPU seconds and
    167 s with this limit. The limit of 512 x 512 is a choice: nothing between was measured. The
    rule depends on sizes only, so that the same call gives the same bits.
    """
    threads = torch.get_num_threads()
    if threads == 1 or entries >= PARALLEL_ENTRIES:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _find_pool(workers: int, share: int) -> ThreadPoolExecutor:
    """Returns the process's one pool of so many workers, each with its share of threads."""
    with _lock:
        if (workers, share) not in _pools:
            _pools[workers, share] = _start_pool(workers, share)
        return _pools[workers, share]


def _start_pool(workers: int, share: int) -> ThreadPoolExecutor:
    threads = torch.get_num_threads()
    started = Barrier(workers)

    def settle() -> None:
        """Sets a worker's number of threads; it keeps that whatever others set."""
        torch.get_num_threads()  # or torch would take the process's number over it at first use
        torch.set_num_threads(share)

    pool = ThreadPoolExecutor(workers, "prolora", settle)
    try:
        for future in [pool.submit(started.wait) for _ in range(workers)]:
            future.result()
    finally:
        # Threads that start later take the last number that any thread has set.
        torch.set_num_threads(threads)
    return pool


def _forget_pools() -> None:
    """Drops the pools, whose threads a forked child does not have."""
    global _lock
    _lock = Lock()
    _pools.clear()


_lock, _pools = Lock(), dict[tuple[int, int], ThreadPoolExecutor]()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


def _is_on_cpu(item: Any) -> bool:
    """Returns whether all tensors in an item or a sequence are on the CPU."""
    if isinstance(item, Tensor):
        return item.device.type == "cpu"
    if isinstance(item, tuple | list):
        return all(_is_on_cpu(part) for part in item)
    return True
