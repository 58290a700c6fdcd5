"""Stacks of weights on their way to a GPU, read ahead.

A stack is read and copied while the GPU works on the one before. On the CPU nothing is copied and
nothing is read ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Out = TypeVar("Out")


class Copies(Protocol):
    """Copies of tensors to a device, beside other work."""

    def start(self, tensors: Sequence[Tensor]) -> Any:
        """Begins to copy; the result belongs to `finish`."""

    def finish(self, copies: Any) -> list[Tensor]:
        """Returns the tensors on the device; work queued from now on waits for them."""


class GpuCopies:
    """Copies from pinned memory in a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        """Opens the stream on a CUDA device."""
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Begins to copy. torch keeps the pinned memory until the copies are done."""
        with torch.cuda.stream(self.stream):
            there = [x.pin_memory().to(self.device, non_blocking=True) for x in tensors]
            return there, self.stream.record_event()

    def finish(self, copies: tuple[list[Tensor], torch.cuda.Event]) -> list[Tensor]:
        """Returns the tensors on the device, for the caller's stream."""
        there, copied = copies
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in there:
            # The memory belongs to the stream of the copies, and is free once this one is through.
            tensor.record_stream(current)
        return there


Reader = Callable[[], tuple[Item, Sequence[Tensor]]]
"""Yields what to work on, and the stacks of weights that belong to it, on the CPU."""


def work_ahead(
    readers: Iterable[Reader[Item]],
    work: Callable[[Item, list[Tensor]], Out],
    copies: Copies,
    submit: Callable[[Callable[[], Any]], Callable[[], Any]],
) -> Iterator[Out]:
    """Works on stacks in turn, and reads and copies the next one meanwhile.

    At most two are alive: the one that `work` has, and the next one. What a reader raises comes
    where its result would.

    Args:
        readers: called in turn.
        work: gets what a reader gave, the weights on the device.
        copies: to the device.
        submit: begins a job and gives what waits for its result.
    """

    def fetch(reader: Reader[Item]) -> tuple[Item, Any]:
        item, tensors = reader()
        return item, copies.start(tensors)

    def finish(wait: Callable[[], tuple[Item, Any]]) -> Out:
        item, begun = wait()
        return work(item, copies.finish(begun))

    begun: Callable[[], Any] | None = None
    for reader in readers:
        following = submit(partial(fetch, reader))
        if begun is not None:
            yield finish(begun)
        begun = following
    if begun is not None:
        yield finish(begun)


def work_in_turn(
    readers: Iterable[Reader[Item]],
    work: Callable[[Item, list[Tensor]], Out],
    device: torch.device,
) -> Iterator[Out]:
    """Works on stacks in turn; on a GPU with `work_ahead`.

    `work` gets what a reader gave, the weights on the device.
    """
    if device.type == "cuda":
        with ThreadPoolExecutor(1, "prolora-read") as pool:
            copies = GpuCopies(device)
            yield from work_ahead(readers, work, copies, lambda job: pool.submit(job).result)
        return
    for reader in readers:
        item, tensors = reader()
        there = [x.to(device) for x in tensors]
        del tensors
        yield work(item, there)
        del there
