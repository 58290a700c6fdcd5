"""What an engine is: it takes batches of moves, and gives a record for each move."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from ....errors import InvalidOption
from ...options import check_choice
from ..plan import Batch
from ..records import Record
from ..worker import RunSettings

EngineName = Literal["local", "ray"]
ENGINES: tuple[str, ...] = get_args(EngineName)


class Engine(Protocol):
    """What runs the batches of a plan, here or elsewhere."""

    def run(self, batches: Iterable[Batch], settings: RunSettings) -> Generator[Record]:
        """Moves the LoRAs of batches and gives a record for each, in any order.

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
        address: of a Ray cluster; None starts one on this machine, or takes the running one.
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
        if self.name == "local":
            for name in ("address", "workers", "gpus_per_worker"):
                if getattr(self, name) is not None:
                    raise InvalidOption(
                        f"{name} is for a cluster, and the engine is local, which is one process: "
                        "add --engine ray, or start one process a shard (--shard 1/4 …)"
                    )


def start_engine(options: EngineOptions) -> Engine:
    """The engine that the options name.

    Raises:
        InvalidOption: it is not installed.
    """
    from .local import LocalEngine

    if options.name == "local":
        return LocalEngine()
    raise InvalidOption("the engine ray is not part of this installation; use --engine local")
