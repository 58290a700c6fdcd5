"""What an engine is: it takes batches of moves, and gives a record for each move."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from ....errors import InvalidOption
from ...options import check_choice
from ..plan import Batch
from ..records import Record
from ..worker import RunSettings
from .local import LocalEngine
from .ray_engine import RayEngine

EngineName = Literal["local", "ray"]
ENGINES: tuple[str, ...] = get_args(EngineName)


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


@dataclass(frozen=True)
class EngineOptions:
    """Which engine, and what it may take.

    Attributes:
        name: "local" (this process) or "ray".
        address: of a Ray cluster; None takes the connection that this process has, or starts Ray on
            this machine.
        workers: how many work at a time; None lets the engine choose.
        gpus_per_worker: share of a GPU that each takes.
    """

    name: EngineName = "local"
    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None

    def __post_init__(self) -> None:
        """Refuses what the engine does not take.

        Raises:
            InvalidOption: names the option.
        """
        check_choice("engine", self.name, ENGINES)
        if self.workers is not None and self.workers < 1:
            raise InvalidOption(f"workers must be 1 or more, not {self.workers!r}")
        if self.gpus_per_worker is not None and not 0 <= self.gpus_per_worker < math.inf:
            raise InvalidOption(
                f"gpus_per_worker is a share of a GPU, not {self.gpus_per_worker!r}"
            )
        if self.name == "local":
            for name in ("address", "workers", "gpus_per_worker"):
                if getattr(self, name) is not None:
                    raise InvalidOption(
                        f"`{name}` is for a cluster, and the engine is local, which is one "
                        "process: take `engine='ray'`, or start one process for each `shard`"
                    )


def start_engine(options: EngineOptions, retries: int = 2) -> Engine:
    """The engine that the options name.

    Args:
        options: which, and what it may take.
        retries: how often a batch is given again whose worker was lost.

    Raises:
        ProLoRAError: it is not installed, does not start, or its cluster cannot be reached.
    """
    if options.name == "local":
        return LocalEngine()
    return RayEngine(options.address, options.workers, options.gpus_per_worker, retries)
