"""How much may be in memory at a time: stacks of weights and LoRAs are cut to fit."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..core.rank_rule import Rank
from ..core.svd.stacks import stack_budget
from ..core.validation import DeviceLike
from ..core.working_memory import PER_COLUMN, bytes_of_factorisation, columns_at_most
from ..errors import TooLittleMemory
from ..files.sizes import format_size

# One stack of weights in float32, without a bound.
STACK_BYTES = 96 << 20
# Python, torch and their buffers grow a little while they work.
SLACK = 48 << 20

Work = Literal["bases", "affinity", "comparison"]
"""What is done with weights: they are factorised, or compared, or both. To be compared the weights
of both bases are in memory."""


def resident_bytes() -> int:
    """Returns the bytes of this process in memory, or its peak so far.

    The peak is taken where only that is known.
    """
    if sys.platform == "win32":
        # PROCESS_MEMORY_COUNTERS: nine fields of eight bytes, the first of which is their size.
        counters = (ctypes.c_uint64 * 9)(72)
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, 72)
        return int(counters[2])  # WorkingSetSize, of this process
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


@dataclass(frozen=True)
class Memory:
    """A bound on the resident memory of this process, or none.

    On a GPU it bounds what is there instead: stacks are as large as keeps the GPU busy
    (`core.svd.stacks.stack_budget`), but within the bound.
    """

    limit: int | None = None  # bytes; None without a bound
    # Of the subspaces; a share of energy may be all columns, and so may None
    rank: Rank | None = None
    device: DeviceLike = None  # where the weights are worked on; None means the CPU

    def check(self, shapes: Iterable[tuple[int, int]], work: Work, results: int = 0) -> None:
        """Refuses a bound below what one weight of each shape needs.

        Before anything is done. The shapes are out × in; `results` are the bytes that the results
        will take.

        Raises:
            TooLittleMemory: says how much is needed.
        """
        if self.limit is None:
            return
        worst = max((_bytes_of_stack(shape, work, 1, self.rank) for shape in shapes), default=0)
        # The results, and beside them what is worked on, or the file that is made of them.
        least = resident_bytes() + SLACK + results + max(worst, results // 2)
        if self.limit < least:
            raise TooLittleMemory(
                f"`max_memory={format_size(self.limit)}` is too little: the largest weight, with "
                f"what prolora and this LoRA take, needs {format_size(least * 1.02)}"
            )

    def room(self, results: int = 0) -> Budget:
        """Returns what is left now for weights, beside results of `results` bytes."""
        place = torch.device(self.device or "cpu")
        on_gpu = stack_budget(place) if place.type == "cuda" else None
        if self.limit is None:
            return Budget(None, self.rank, on_gpu)
        return Budget(self.limit - resident_bytes() - results - SLACK, self.rank, on_gpu)


@dataclass(frozen=True)
class Budget:
    """How much is worked on at a time."""

    free: int | None = None  # bytes; None without a bound
    rank: Rank | None = None  # as in `Memory`
    on_gpu: int | None = None  # bytes for a stack on a GPU, where the work is done there

    def stack(self, shape: tuple[int, int], work: Work) -> int:
        """Returns how many weights [m, n] to work on at a time, at least one."""
        if self.on_gpu is None:
            count = max(torch.get_num_threads(), STACK_BYTES // (4 * shape[0] * shape[1]))
        else:
            count = max(1, self.on_gpu // max(1, _bytes_of_weight(shape, work, self.rank)))
        if self.free is not None:
            while count > 1 and _bytes_of_stack(shape, work, count, self.rank) > self.free:
                count -= 1
        return count

    def columns(self, shape: tuple[int, int]) -> int:
        """Returns how many columns of factors to project at a time.

        The columns of all weights [m, n] count together. Within a bound they fit where the
        factorisation of a weight was before.
        """
        size = STACK_BYTES if self.on_gpu is None else self.on_gpu
        if self.free is not None:
            size = min(size, bytes_of_factorisation(shape, self.rank))
        return max(1, size // (PER_COLUMN * sum(shape)))

    def pairs(self, shape: tuple[int, int]) -> int:
        """Returns how many pairs of weights [m, n] to compare at a time."""
        threads = torch.get_num_threads()
        return threads if self.free is None else min(threads, self.stack(shape, "affinity"))


def _bytes_of_stack(shape: tuple[int, int], work: Work, count: int, rank: Rank | None) -> int:
    """Returns the bytes of a stack of `count` weights [m, n] and their work."""
    size = count * _bytes_of_weight(shape, work, rank)
    if work != "affinity":
        size += min(count, torch.get_num_threads()) * bytes_of_factorisation(shape, rank)
    return size


def _bytes_of_weight(shape: tuple[int, int], work: Work, rank: Rank | None) -> int:
    """Returns the bytes of a stack's weight [m, n] and its by-products."""
    m, n = shape
    if work == "affinity":
        return 2 * 4 * m * n
    bases = 2 * 4 * (m + n) * columns_at_most(shape, rank)
    return (2 if work == "comparison" else 1) * 4 * m * n + bases
