"""What runs in a process of Ray: the engine local, to which batches are given."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ....version import __version__
from ..plan import Batch
from ..records import Record
from ..worker import RunSettings
from .local import LocalEngine
from .ray_session import import_ray

# Seconds: the driver tells whether a process gets on, also one that is frozen.
_NO_LIMIT = 1e9
# How long a network drive may take to show a new file.
_SETTLING_SECONDS = 2.0


@dataclass(frozen=True)
class Arrival:
    """Where a worker runs, which it says before it moves anything.

    Attributes:
        node: the id that Ray gives the node.
        name: of the machine and the node, for messages.
        problem: why the node is not used; "" if it is.
    """

    node: str
    name: str
    problem: str = ""


class RayWorker:
    """An actor. Its process and its opened bases last from one batch to the next."""

    def __init__(self, settings: RunSettings) -> None:
        """Opens nothing yet: what fails in here would be taken for a lost worker."""
        self._settings = replace(settings, time_limit=_NO_LIMIT)
        self._engine = LocalEngine()

    def move(self, batch: Batch, version: str) -> Iterator[Arrival | Record | None]:
        """Moves LoRAs: where, then a record for each, and None whenever a step is done.

        Args:
            batch: the LoRAs.
            version: of prolora where the driver runs.
        """
        arrival = self.locate()
        if version != __version__:
            arrival = replace(arrival, problem=f"has prolora {__version__}, and not {version}")
        elif not _sees(self._settings.mark):
            problem = f"has another folder of the name {self._settings.folder}"
            arrival = replace(arrival, problem=problem)
        yield arrival
        if not arrival.problem:
            yield from self._engine.run([batch], self._settings)

    def locate(self) -> Arrival:
        """Where this process runs."""
        node = str(import_ray().get_runtime_context().get_node_id())
        return Arrival(node, f"{socket.gethostname()} ({node[:8]})")

    def close(self) -> None:
        """Saves what was learnt of the bases."""
        self._engine.close()


def _sees(mark: str) -> bool:
    """Whether a file is there, or appears soon."""
    deadline = time.monotonic() + _SETTLING_SECONDS
    while not os.path.exists(mark):
        if time.monotonic() > deadline or not os.path.exists(os.path.dirname(mark)):
            return False
        time.sleep(0.1)
    return True
