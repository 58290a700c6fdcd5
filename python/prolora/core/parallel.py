"""Independent matrices over the cores of the CPU, one core each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

In = TypeVar("In")
Out = TypeVar("Out")


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
    share = threads // workers
    inference = torch.is_inference_mode_enabled()

    def alone(item: In) -> Out:
        # Kept by each thread for itself.
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            return job(item)

    try:
        with ThreadPoolExecutor(workers, "prolora", torch.set_num_threads, (share,)) as pool:
            return list(pool.map(alone, items))
    finally:
        # Threads that start later take the last number that any thread has set.
        torch.set_num_threads(threads)


def _is_on_cpu(item: Any) -> bool:
    """Returns whether all tensors in an item or a sequence are on the CPU."""
    if isinstance(item, Tensor):
        return item.device.type == "cpu"
    if isinstance(item, tuple | list):
        return all(_is_on_cpu(part) for part in item)
    return True
