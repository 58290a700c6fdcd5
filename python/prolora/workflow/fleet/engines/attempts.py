"""Batches on their way to workers, and what becomes of one whose worker is lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ....errors import ProLoRAError
from ..plan import Batch, Entry, PairOfBases


class LostWorker(ProLoRAError):
    """The process that moved a LoRA ended, each time that it was tried."""

    code = "lost-worker"


class HungWorker(ProLoRAError):
    """Whoever moved a LoRA did not get on any more."""

    code = "hung-worker"


@dataclass(frozen=True)
class Attempt:
    """A batch, and what is known of it from earlier tries.

    Attributes:
        batch: what is to be done.
        losses: how many workers were lost with this LoRA alone.
        avoid: ids of the nodes that do not have what it needs.
    """

    batch: Batch
    losses: int = 0
    avoid: frozenset[str] = frozenset()

    @property
    def pair(self) -> PairOfBases:
        """Its bases."""
        return self.batch.pair

    def narrow(self, entries: Iterable[Entry]) -> Attempt:
        """The same for some of its LoRAs."""
        return replace(self, batch=replace(self.batch, entries=tuple(entries)))


class AttemptQueue:
    """The work of a run: batches that came back go before those that were never tried."""

    def __init__(self, batches: Iterable[Batch], retries: int, workers: int = 1) -> None:
        """Takes nothing yet.

        Args:
            batches: taken one at a time, as workers are free.
            retries: how often a LoRA is given again that a worker was lost with.
            workers: how many take batches at a time.
        """
        self._hung, self._workers = 0, workers
        self._fresh = iter(batches)
        self._returned: deque[Attempt] = deque()
        self._retries = retries

    def take(self, node: str = "") -> Attempt | None:
        """The next one, or None where there is none for a node; "" stands for any.

        What another node must do is left to it; until it has, no more is begun than it can do soon.
        """
        for attempt in self._returned:
            if node not in attempt.avoid:
                self._returned.remove(attempt)
                return attempt
        if len(self._returned) > self._workers:
            return None
        batch = next(self._fresh, None)
        return None if batch is None else Attempt(batch)

    def put_back(self, attempt: Attempt) -> None:
        """Takes back what was not tried."""
        self._returned.appendleft(attempt)

    def note_success(self) -> None:
        """Notes that a worker gets on."""
        self._hung = 0

    def return_lost(self, attempt: Attempt, hung: bool = False) -> tuple[Entry, ...]:
        """Takes back what a worker that was lost has not done.

        Its LoRAs are tried one at a time from then on, so that one which ends its process does not
        take the others along; each as often as there are retries, since a worker may be lost by
        chance. One that hangs, which takes long to notice, is tried alone once.

        Args:
            attempt: what is left of it.
            hung: whether the worker did not get on any more, and was not lost otherwise.

        Returns:
            The LoRAs that are given up: none, or the one that was tried alone.

        Raises:
            HungWorker: one after the other hangs, so that it is not due to the LoRAs.
        """
        self._hung += hung
        if self._hung > 2 * self._workers:
            raise HungWorker(
                f"{self._hung} workers one after the other did not get on: a drive or a device may "
                "hang. Run again when it works"
            )
        entries = attempt.batch.entries
        if len(entries) > 1:
            self._returned.extend(attempt.narrow([entry]) for entry in entries)
        elif entries and (hung or attempt.losses >= self._retries):
            return entries
        elif entries:
            self._returned.append(replace(attempt, losses=attempt.losses + 1))
        return ()

    def return_elsewhere(self, attempt: Attempt, node: str) -> None:
        """Takes back what another node may have."""
        self._returned.append(replace(attempt, avoid=attempt.avoid | {node}))
