"""What an engine is: it takes batches of moves, and gives a record for each move."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Protocol

from ..plan import Batch
from ..records import Record
from ..worker import RunSettings


class Engine(Protocol):
    """What runs the batches of a plan, here or elsewhere."""

    def run(self, batches: Iterable[Batch], settings: RunSettings) -> Generator[Record | None]:
        """Moves the LoRAs of batches and gives a record for each, in any order.

        In between it gives None whenever a worker has got on. One that does not for as long as the
        settings allow is given up.

        A LoRA that fails is a record; an exception of this method ends the run. Batches are taken
        from the iterable no earlier than there is a worker for them: by then another process may
        have done what the next one holds.

        Args:
            batches: those of one pair of bases follow each other.
            settings: what all workers need to know; it can be pickled.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine holds: workers, opened bases, temporary folders."""
        ...
