"""The engine that needs nothing: this process moves one batch after the other."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Generator, Iterable

import torch

from ..plan import Batch, PairOfBases
from ..records import Record
from ..worker import PairWorker, RunSettings
from .attempts import Attempt, AttemptQueue, HungWorker

# Between two signs of life of a worker, and until one that was told to has ended.
_BEAT_SECONDS, _CLOSE_SECONDS = 0.2, 30.0

log = logging.getLogger(__name__)


class LocalEngine:
    """One worker at a time; a pair of bases stays open until the next one comes.

    It has a thread of its own, so that one that hangs (a drive that does not answer) can be left
    behind.
    """

    def __init__(self) -> None:
        """Opens nothing yet."""
        self._worker: _LocalWorker | None = None

    def run(self, batches: Iterable[Batch], settings: RunSettings) -> Generator[Record | None]:
        """See `Engine.run`; records come as soon as each LoRA is written."""
        attempts = AttemptQueue(batches, 0)
        try:
            while (attempt := attempts.take()) is not None:
                yield from self._move(attempt, attempts, settings)
        except BaseException:
            self._leave(_CLOSE_SECONDS)
            raise

    def _move(
        self, attempt: Attempt, attempts: AttemptQueue, settings: RunSettings
    ) -> Generator[Record | None]:
        """The records of a batch."""
        if self._worker is None or self._worker.settings != settings:
            self.close()
            self._worker = _LocalWorker(settings)
        self._worker.batches.put(attempt.batch)
        left = list(attempt.batch.entries)
        while True:
            try:
                answer = self._worker.answers.get(timeout=settings.time_limit)
            except queue.Empty:
                break
            if isinstance(answer, BaseException):
                self._worker = None
                raise answer
            if answer is _END:
                return
            if isinstance(answer, Record):
                attempts.note_success()
                left = [entry for entry in left if entry.lora != answer.lora]
            yield answer if isinstance(answer, Record) else None
        self._leave(0.0)
        log.warning("a worker has not got on for %g s, and is left behind", settings.time_limit)
        for entry in attempts.return_lost(attempt.narrow(left), hung=True):
            error = HungWorker(f"nothing was done for it for {settings.time_limit:g} s")
            yield Record.of_failure(settings.plan.key(entry), entry, error)

    def _leave(self, seconds: float) -> None:
        """Lets the worker end at its next step, and waits a while for that."""
        if self._worker is not None:
            self._worker.is_left = True
            self._worker.batches.put(None)
            self._worker.join(seconds)
        self._worker = None

    def close(self) -> None:
        """Closes the bases."""
        if self._worker is not None:
            self._worker.batches.put(None)
            self._worker.join(self._worker.settings.time_limit)
        self._worker = None


class _LeftBehind(BaseException):
    """Ends the thread of a worker that nobody waits for any more."""


_END = object()


class _LocalWorker(threading.Thread):
    """The thread in which LoRAs are moved.

    Attributes:
        settings: of the run.
        batches: what it is given; None ends it.
        answers: records; None for a step that is done; `_END` after each batch; what ended it.
        is_left: whether it is to end at its next step.
    """

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(name="prolora-worker", daemon=True)
        self.settings = settings
        self.batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.is_left = False
        self._beaten = 0.0
        self._worker: PairWorker | None = None
        self._pair: PairOfBases | None = None
        # Each thread has a current device of its own.
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.start()

    def run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        try:
            while (batch := self.batches.get()) is not None:
                for record in self._open(batch.pair).move_each(batch.entries):
                    self.answers.put(record)
                self.answers.put(_END)
        except _LeftBehind:
            pass
        except BaseException as error:
            self.answers.put(error)
        try:
            self._close()
        except Exception as error:
            log.warning("what was learnt of the bases was not saved: %s", error)

    def _open(self, pair: PairOfBases) -> PairWorker:
        if self._worker is None or self._pair != pair:
            self._close()
            self._worker, self._pair = PairWorker(pair, self.settings, self._beat), pair
        return self._worker

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None

    def _beat(self) -> None:
        """Shows that a step is done.

        Raises:
            _LeftBehind: nobody waits any more.
        """
        if self.is_left:
            raise _LeftBehind
        if time.monotonic() - self._beaten > _BEAT_SECONDS:
            self._beaten = time.monotonic()
            self.answers.put(None)
