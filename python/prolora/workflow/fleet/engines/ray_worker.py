"""What runs in a process of Ray: one pair of bases, opened, that batches are given to."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ....bases.cache.basis_cache import default_folder
from ....bases.cache.cache_files import publish_file
from ....bases.cache.cache_folder import create_versioned_folder, versioned_folder
from ....version import __version__
from ...by_weights.ledger import LORA_FAILURES
from ...pair_mover import as_refusal
from ..plan import Entry, PairOfBases
from ..records import Record
from ..worker import PairWorker, RunSettings
from .folder_check import sees_mark
from .ray_session import import_ray


@dataclass(frozen=True)
class Location:
    """Where a worker runs.

    Attributes:
        node: the id that Ray gives the node.
        name: of the machine and the node, for messages.
        process: its number.
        version: of prolora there.
    """

    node: str
    name: str
    process: int
    version: str


@dataclass(frozen=True)
class Surroundings:
    """What a worker's node has.

    Attributes:
        has_folder: whether the folder of the results is the driver's.
        has_cache: whether the cache folder is the driver's; True where there is none.
        bases: names of the files that the node's own cache holds, if the driver's is not there.
    """

    has_folder: bool
    has_cache: bool
    bases: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Opening:
    """Whether the bases could be opened; the reason if not."""

    problem: str = ""


@dataclass(frozen=True)
class Moved:
    """What became of a batch.

    Attributes:
        records: of the LoRAs that were tried.
        missing: LoRAs that are not on this node, and were not tried.
    """

    records: tuple[Record, ...]
    missing: tuple[Entry, ...] = ()


class RayWorker:
    """An actor for one pair of bases. No method raises what a base or a LoRA can cause."""

    def __init__(self, pair: PairOfBases, settings: RunSettings) -> None:
        """Opens nothing yet: what fails in here would be taken for a lost worker."""
        self._pair, self._settings = pair, settings
        self._worker: PairWorker | None = None
        self._steps = 0

    def count_steps(self) -> int:
        """How many steps are done; it answers while another method is at work."""
        return self._steps

    def _count_step(self) -> None:
        self._steps += 1

    def locate(self) -> Location:
        """Where this process runs."""
        node = str(import_ray().get_runtime_context().get_node_id())
        return Location(node, f"{socket.gethostname()} ({node[:8]})", os.getpid(), __version__)

    def look_around(self, folder_mark: Path, cache_mark: Path | None) -> Surroundings:
        """Whether the folders of the driver are here; without its cache the node's own is used."""
        has_folder = sees_mark(folder_mark)
        if cache_mark is None or sees_mark(cache_mark):
            return Surroundings(has_folder, True)
        own = default_folder()
        self._settings = replace(self._settings, cache=str(own))
        versioned = versioned_folder(own)
        held = (path.relative_to(versioned).as_posix() for path in versioned.glob("**/*.*"))
        return Surroundings(has_folder, False, frozenset(held))

    def receive(self, name: str, content: bytes) -> str:
        """Puts a file of the driver's cache into the node's; gives the reason if that fails.

        Args:
            name: below the folder of this version.
            content: the whole file.
        """
        own = Path(str(self._settings.cache))
        try:
            create_versioned_folder(own)
            publish_file(versioned_folder(own) / name, lambda file: file.write_bytes(content))
        except OSError as error:
            return str(error)
        return ""

    def open(self) -> Opening:
        """Opens the bases."""
        try:
            self._worker = PairWorker(self._pair, self._settings, self._count_step)
            self._worker.open()
        except LORA_FAILURES as error:
            return Opening(str(as_refusal(error)))
        return Opening()

    def move(self, entries: Sequence[Entry], others: bool) -> Moved:
        """Moves LoRAs.

        Args:
            entries: the LoRAs.
            others: whether another node may have a LoRA that this one lacks.
        """
        assert self._worker is not None, "open comes first"
        here = [entry for entry in entries if not others or os.path.exists(entry.lora)]
        missing = tuple(entry for entry in entries if entry not in here)
        return Moved(tuple(self._worker.move(here)) if here else (), missing)

    def close(self) -> None:
        """Saves what was learnt of the bases."""
        if self._worker is not None:
            self._worker.close()
