"""The engine that needs nothing: this process moves one batch after the other."""

from __future__ import annotations

from collections.abc import Generator, Iterable

from ..plan import Batch, PairOfBases
from ..records import Record
from ..worker import PairWorker, RunSettings


class LocalEngine:
    """One worker at a time; a pair of bases stays open until the next one comes."""

    def __init__(self) -> None:
        """Opens nothing yet."""
        self._worker: PairWorker | None = None
        self._opened: tuple[PairOfBases, RunSettings] | None = None

    def run(self, batches: Iterable[Batch], settings: RunSettings) -> Generator[Record]:
        """See `Engine.run`; records come as soon as each LoRA is written."""
        for batch in batches:
            yield from self._find_worker(batch.pair, settings).move_each(batch.entries)

    def _find_worker(self, pair: PairOfBases, settings: RunSettings) -> PairWorker:
        if self._worker is None or self._opened != (pair, settings):
            self.close()
            self._worker, self._opened = PairWorker(pair, settings), (pair, settings)
        return self._worker

    def close(self) -> None:
        """Closes the bases."""
        if self._worker is not None:
            self._worker.close()
        self._worker = self._opened = None
