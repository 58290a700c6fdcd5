"""Giving batches to workers of Ray, and starting others where workers are lost."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....bases.cache.cache_folder import list_entries, versioned_folder
from ....errors import OutputError, ProLoRAError
from ....version import __version__
from ..plan import Batch, PairOfBases
from ..records import Record
from ..worker import RunSettings
from .attempts import Attempt, AttemptQueue
from .folder_check import FolderMark
from .ray_session import WorkerNeeds, shorten
from .ray_worker import Location, Moved, Opening, RayWorker, Surroundings

# How long a run waits for room for its first worker: other jobs may end, machines may be added.
_PATIENCE_SECONDS = 600.0
_CLOSE_SECONDS = 10.0

log = logging.getLogger(__name__)


class LostWorker(ProLoRAError):
    """The process that moved a LoRA ended, each time that it was tried."""


@dataclass(eq=False)
class _Worker:
    """An actor, as the driver sees it.

    Attributes:
        actor: the handle.
        pair: its bases.
        attempt: the batch that it has, or gets when its bases are open.
        location: None until it runs.
    """

    actor: Any
    pair: PairOfBases
    attempt: Attempt | None
    location: Location | None = None

    @property
    def node(self) -> str:
        """The id of its node; "" until it runs."""
        return self.location.node if self.location else ""


class RayDriver:
    """One run: its workers and what each of them is doing."""

    def __init__(self, ray: Any, needs: WorkerNeeds, settings: RunSettings, retries: int) -> None:
        """Starts nothing yet.

        Args:
            ray: the module, connected.
            needs: of each worker.
            settings: of the run.
            retries: how often a batch is given again whose worker was lost.
        """
        self._ray, self._needs, self._retries = ray, needs, retries
        if needs.gpus and settings.device is None:
            settings = replace(settings, device="cuda")
        self._settings = settings
        self._class = ray.remote(RayWorker)
        self._folder_mark = FolderMark(Path(settings.folder))
        self._cache_mark = FolderMark(Path(settings.cache)) if settings.cache else None
        self._busy: dict[Any, _Worker] = {}  # by what Ray answers with
        self._idle: list[_Worker] = []
        self._closing: list[Any] = []
        self._unfit: dict[tuple[PairOfBases, str], str] = {}
        self._foreign: dict[str, str] = {}
        self._shipped: set[str] = set()
        self._most = needs.most
        self._failed_starts = 0
        self._last_success = time.monotonic()

    def run(self, batches: Iterable[Batch]) -> Iterator[Record]:
        """The records of all batches.

        Raises:
            OutputError: no node has the folder of the results.
            ProLoRAError: no node has room for a worker, or workers do not start.
        """
        self._queue = AttemptQueue(batches, self._retries)
        while True:
            self._hand_out()
            if not self._busy:
                return
            for answer in self._wait():
                yield from self._receive(answer)

    # What there is to do, to workers.

    def _hand_out(self) -> None:
        """Gives work to idle workers and starts others, as long as there is both."""
        while self._idle or len(self._busy) < self._most:
            attempt = self._queue.take()
            if attempt is None:
                break
            self._give(attempt)
        for worker in self._idle:
            self._retire(worker)
        self._idle.clear()

    def _give(self, attempt: Attempt) -> None:
        """Lets an idle worker or a new one have a batch."""
        for worker in self._idle:
            if worker.pair == attempt.pair and worker.node not in attempt.avoid:
                self._idle.remove(worker)
                self._move(worker, attempt)
                return
        if self._idle and len(self._busy) + len(self._idle) >= self._most:
            self._retire(self._idle.pop(0))
        self._start(attempt)

    def _start(self, attempt: Attempt) -> None:
        """Starts a worker for a batch, on a node that may have what it needs."""
        bad = {node for (pair, node) in self._unfit if pair == attempt.pair}
        bad |= attempt.avoid | self._foreign.keys()
        options: dict[str, Any] = {"num_cpus": self._needs.cores, "num_gpus": self._needs.gpus}
        if self._needs.memory:
            options["memory"] = self._needs.memory
        if bad:
            good = [node for node in self._list_nodes() if node not in bad]
            if good:
                options["scheduling_strategy"] = self._pin(good)
        actor = self._class.options(max_restarts=0, **options).remote(attempt.pair, self._settings)
        self._busy[actor.locate.remote()] = _Worker(actor, attempt.pair, attempt)

    def _pin(self, nodes: list[str]) -> Any:
        """Lets Ray start a worker on the one of these nodes that has the fewest of ours."""
        taken = [worker.node for worker in (*self._busy.values(), *self._idle)]
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        node = min(nodes, key=taken.count)
        return strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    def _list_nodes(self) -> list[str]:
        return self._needs.list_fitting(self._ray.nodes())

    def _move(self, worker: _Worker, attempt: Attempt) -> None:
        worker.attempt = attempt
        others = self._has_others(worker, attempt)
        self._busy[worker.actor.move.remote(attempt.batch.entries, others)] = worker

    def _has_others(self, worker: _Worker, attempt: Attempt) -> bool:
        """Whether another node may have what this one lacks."""
        bad = attempt.avoid | {worker.node} | self._foreign.keys()
        return any(
            node not in bad and (attempt.pair, node) not in self._unfit
            for node in self._list_nodes()
        )

    # What workers answer.

    def _wait(self) -> list[Any]:
        """The answers that are there, one at least.

        Raises:
            ProLoRAError: no node has had room for a worker for a long time.
        """
        while True:
            ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=1.0)
            if ready:
                return list(ready)
            waiting = [worker for worker in self._busy.values() if worker.location is None]
            if len(waiting) < len(self._busy):
                self._pass_on(waiting)
            elif time.monotonic() - self._last_success > _PATIENCE_SECONDS:
                raise ProLoRAError(
                    f"no node of the Ray cluster has had room for a worker for "
                    f"{_PATIENCE_SECONDS:.0f} s; one needs {self._needs}"
                )

    def _pass_on(self, waiting: list[_Worker]) -> None:
        """At the end, takes batches back from workers that have no room yet."""
        if not self._queue.is_exhausted:
            return
        for ref, worker in list(self._busy.items()):
            if worker in waiting and worker.attempt is not None:
                del self._busy[ref]
                self._kill(worker)
                self._queue.put_back(worker.attempt)
        self._most = len(self._busy)

    def _receive(self, ref: Any) -> Iterator[Record]:
        """Takes an answer: the next step of the worker follows from it."""
        worker = self._busy.pop(ref)
        try:
            answer = self._ray.get(ref)
        except Exception as error:  # of Ray; our own come as answers
            yield from self._replace(worker, shorten(error))
            return
        self._last_success = time.monotonic()
        if isinstance(answer, Location):
            self._look_around(worker, answer)
        elif isinstance(answer, Surroundings):
            self._open(worker, answer)
        elif isinstance(answer, Opening):
            self._begin(worker, answer)
        elif isinstance(answer, Moved):
            yield from self._finish(worker, answer)

    def _look_around(self, worker: _Worker, location: Location) -> None:
        worker.location = location
        if location.version != __version__:
            problem = f"has prolora {location.version}, and not {__version__}"
            self._leave(worker, problem)
            return
        marks = self._folder_mark.renew(), self._cache_mark and self._cache_mark.renew()
        self._busy[worker.actor.look_around.remote(*marks)] = worker

    def _open(self, worker: _Worker, found: Surroundings) -> None:
        if not found.has_folder:
            self._leave(worker, f"has another folder of the name {self._settings.folder}")
            return
        if not found.has_cache and worker.node not in self._shipped:
            self._shipped.add(worker.node)
            self._ship(worker, found.bases)
        self._busy[worker.actor.open.remote()] = worker

    def _begin(self, worker: _Worker, opening: Opening) -> None:
        assert worker.attempt is not None
        attempt = worker.attempt
        if opening.problem:
            self._unfit[attempt.pair, worker.node] = opening.problem
            if self._has_others(worker, attempt):
                self._queue.put_back(attempt)
                self._retire(worker)
                return
        self._failed_starts = 0
        # Where the bases are on no node, the records say so.
        self._move(worker, attempt)

    def _finish(self, worker: _Worker, moved: Moved) -> Iterator[Record]:
        attempt, worker.attempt = worker.attempt, None
        assert attempt is not None and worker.location is not None
        if moved.missing:
            self._queue.return_elsewhere(moved.missing, attempt, worker.node)
        several = len(self._list_nodes()) > 1
        for record in moved.records:
            if several and record.status == "failed":
                record = replace(record, reason=f"{record.reason} [{worker.location.name}]")
            yield record
        self._idle.append(worker)

    # Workers that come and go.

    def _leave(self, worker: _Worker, problem: str) -> None:
        """Uses a node no more.

        Raises:
            OutputError: no node is left.
        """
        assert worker.location is not None and worker.attempt is not None
        self._foreign[worker.node] = f"{worker.location.name} {problem}"
        self._queue.put_back(worker.attempt)
        self._retire(worker)
        if all(node in self._foreign for node in self._list_nodes()):
            raise OutputError(
                f"no node of the Ray cluster can work on {self._settings.folder}: "
                f"{'; '.join(self._foreign.values())}. All nodes need the same folder of results "
                "under the same path (a network drive), and the same version of prolora"
            )

    def _replace(self, worker: _Worker, why: str) -> Iterator[Record]:
        """Takes back the batch of a lost worker; gives the records of LoRAs that are given up.

        Raises:
            ProLoRAError: workers do not even start.
        """
        self._kill(worker)
        assert worker.attempt is not None
        where = worker.location.name if worker.location else "a node"
        log.warning("a worker on %s was lost: %s", where, why)
        if worker.location is None:
            self._failed_starts += 1
            if self._failed_starts > self._retries:
                raise ProLoRAError(f"workers of Ray do not start: {why}")
            self._queue.put_back(worker.attempt)
            return
        for entry in self._queue.return_lost(worker.attempt):
            reason = f"its process ended each time that it was tried, at last on {where}: {why}"
            key = self._settings.plan.key(entry)
            yield Record.of_failure(key, entry, LostWorker(reason))

    def _retire(self, worker: _Worker) -> None:
        """Lets a worker save what it has learnt; it ends when nobody holds it."""
        self._closing.append(worker.actor.close.remote())

    def _kill(self, worker: _Worker) -> None:
        with suppress(Exception):
            self._ray.kill(worker.actor)

    def _ship(self, worker: _Worker, held: frozenset[str]) -> None:
        """Gives a node what the driver's cache holds and the node's own does not."""
        folder = Path(str(self._settings.cache))
        versioned = versioned_folder(folder)
        for entry in list_entries(folder):
            if versioned not in entry.path.parents or not _is_portable(entry.path, entry.kind):
                continue
            name = entry.path.relative_to(versioned).as_posix()
            if name in held:
                continue
            try:
                problem = self._ray.get(worker.actor.receive.remote(name, entry.path.read_bytes()))
            except Exception as error:  # of Ray: the next answer shows that the worker is lost
                problem = shorten(error)
            if problem:
                log.warning("the cache was not shipped to a node: %s", problem)
                return

    def close(self) -> None:
        """Ends the workers, and removes what shows them the folders."""
        for worker in self._busy.values():
            self._kill(worker)
        for worker in self._idle:
            self._retire(worker)
        self._busy.clear()
        self._idle.clear()
        if self._closing:
            with suppress(Exception):
                self._ray.wait(
                    self._closing, num_returns=len(self._closing), timeout=_CLOSE_SECONDS
                )
        for mark in (self._folder_mark, self._cache_mark):
            if mark is not None:
                mark.remove()


def _is_portable(path: Path, kind: str) -> bool:
    """Whether a file of a cache is true on another machine: an index is of this one's files."""
    return kind == "basis" or (kind == "table" and path.name.startswith("pairs-"))
