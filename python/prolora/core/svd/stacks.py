"""Sizes of stacks, and the host's free decisions.

A GPU is kept busy by stacks, and it waits wherever the host reads a number from it. So a stack goes
through the ladder as one there, by operators that take all of its matrices at once, and the host
decides seldom. On the CPU a matrix that fits a core's cache is faster than a stack, threads share
out the matrices, and a decision is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tuning import TUNING

# Tests and counts set this: the CPU then takes whole stacks and decides seldom, as a GPU does.
FORCE_BATCHED = False

# Compute capabilities with half as many units for float64 as for float32: P100, V100, A100, H100
# and B200. (12.0 are cards for games, which have one in 32 or 64.)
SLOW_FLOAT64_COST = 40.0
FAST_FLOAT64 = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})


def is_on_host(tensor: Tensor) -> bool:
    """Returns whether the host may look at this tensor without waiting for a device."""
    return tensor.is_cpu and not FORCE_BATCHED


def float64_cost(device: torch.device) -> float:
    """Returns how many flops in float32 one in float64 costs on a device.

    Two on CPUs and on those GPUs that are built for it, 32 to 64 on all others.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) in FAST_FLOAT64:
        return 2.0
    return SLOW_FLOAT64_COST


def take_places(stack: Tensor, places: list[int]) -> Tensor:
    """Selects matrices of a stack [b, …], without waiting for a device."""
    index = torch.tensor(places, dtype=torch.int64, device="cpu")
    return stack.index_select(0, index.to(stack.device, non_blocking=True))


def chunk_size(shape: torch.Size, device: torch.device, few_columns: bool = False) -> int:
    """Counts the matrices of a shape [m, n] that are worked on together.

    shape: of one matrix; device: where they are; few_columns: whether no more than an eighth of the
    columns are asked for.
    """
    m, n = shape
    if device.type == "cpu":
        # A stack of any size, as a GPU with memory enough would take it.
        return max(1, TUNING.cpu_stack_bytes // (8 * m * n)) if not FORCE_BATCHED else 1 << 30
    return max(1, stack_budget(device) // _working_bytes(m, n, few_columns))


def stack_budget(device: torch.device) -> int:
    """Returns the bytes that a stack may take on a GPU now."""
    return _gpu_budget(*_gpu_memory(device))


def _working_bytes(m: int, n: int, few_columns: bool) -> int:
    """Estimates the bytes that one matrix [m, n] takes on a GPU."""
    if few_columns:  # the weight in float32 and float64, a basis and its projection
        return 16 * m * n + 20 * min(m, n) ** 2
    # The weight and the factors of its long side in both precisions; of the short side the Gram
    # matrix, its eigenvectors, products, residuals and steps.
    return 32 * m * n + 80 * min(m, n) ** 2


def _gpu_budget(free: int, total: int) -> int:
    """Returns the bytes that a stack may take on a GPU."""
    budget = min(
        TUNING.gpu_most_bytes, max(TUNING.gpu_least_bytes, int(total * TUNING.gpu_share_of_total))
    )
    while budget > max(1, free * TUNING.gpu_share_of_free):
        budget //= 2
    return budget


def _gpu_memory(device: torch.device) -> tuple[int, int]:
    """Returns the bytes free on a GPU, torch's own reserve included, and in total."""
    free, total = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + reserve, total
