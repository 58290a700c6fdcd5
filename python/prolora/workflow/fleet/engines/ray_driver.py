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
from .attempts import Attempt, AttemptQueue, HungWorker, LostWorker
from .folder_check import FolderMark
from .ray_session import WorkerNeeds, shorten
from .ray_vitals import RayVitals
from .ray_worker import Location, Moved, Opening, RayWorker, Surroundings

# How long a run waits for room for its first worker: other jobs may end, machines may be added.
_PATIENCE_SECONDS = 600.0
_CLOSE_SECONDS = 10.0
# Between two questions to each worker how far it is.
_ASK_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _DrivenWorker:
    """An actor, as the driver sees it.

    Attributes:
        actor: the handle.
        pair: its bases.
        attempt: the batch that it has, or gets when its bases are open.
        location: None until it runs.
        steps: that it had done when it was asked last.
        moved: when that number grew, or it was given something to do, by the driver's clock.
        question: what it was asked last about its steps; None if it has answered.
    """

    actor: Any
    pair: PairOfBases
    attempt: Attempt | None
    location: Location | None = None
    steps: int = 0
    moved: float = 0.0
    question: Any = None

    @property
    def node(self) -> str:
        """The id of its node; "" until it runs."""
        return self.location.node if self.location else ""


class RayDriver:
    """One run: its workers and what each of them is doing."""

    def __init__(
        self,
        ray: Any,
        needs: WorkerNeeds,
        settings: RunSettings,
        retries: int,
        vitals: RayVitals | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            ray: the module, connected.
            needs: of each worker.
            settings: of the run.
            retries: how often a batch is given again whose worker was lost.
            vitals: whether Ray's own processes live; None asks nobody.
        """
        self._vitals = vitals or RayVitals([])
        self._asked = 0.0
        self._ray, self._needs, self._retries = ray, needs, retries
        if needs.gpus and settings.device is None:
            settings = replace(settings, device="cuda")
        self._settings = settings
        self._class = ray.remote(RayWorker)
        self._folder_mark = FolderMark(Path(settings.folder))
        self._cache_mark = FolderMark(Path(settings.cache)) if settings.cache else None
        self._busy: dict[Any, _DrivenWorker] = {}  # by what Ray answers with
        self._idle: list[_DrivenWorker] = []
        self._closing: dict[Any, _DrivenWorker] = {}
        self._unfit: dict[tuple[PairOfBases, str], str] = {}
        self._foreign: dict[str, str] = {}
        self._shipped: set[str] = set()
        self._most = needs.most
        self._failed_starts = 0
        self._last_success = time.monotonic()

    def run(self, batches: Iterable[Batch]) -> Iterator[Record | None]:
        """The records of all batches, and None whenever a worker has got on.

        Raises:
            OutputError: no node has the folder of the results.
            ProLoRAError: no node has room for a worker, workers do not start or hang one after the
                other, or Ray's own processes have ended.
        """
        self._queue = AttemptQueue(batches, self._retries, self._most)
        while True:
            self._hand_out()
            if not self._busy:
                return
            for answer in self._wait():
                yield from self._receive(answer)
            yield from self._watch()

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
        # One method does the work, and another says how far it is.
        options |= {"max_restarts": 0, "max_concurrency": 2}
        actor = self._class.options(**options).remote(attempt.pair, self._settings)
        self._ask(_DrivenWorker(actor, attempt.pair, attempt), actor.locate)

    def _ask(self, worker: _DrivenWorker, method: Any, *arguments: object) -> None:
        """Gives a worker something to do."""
        worker.moved = time.monotonic()
        self._busy[method.remote(*arguments)] = worker

    def _pin(self, nodes: list[str]) -> Any:
        """Lets Ray start a worker on the one of these nodes that has the fewest of ours."""
        taken = [worker.node for worker in (*self._busy.values(), *self._idle)]
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        node = min(nodes, key=taken.count)
        return strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    def _list_nodes(self) -> list[str]:
        self._vitals.check()
        return self._needs.list_fitting(self._ray.nodes())

    def _move(self, worker: _DrivenWorker, attempt: Attempt) -> None:
        worker.attempt = attempt
        others = self._has_others(worker, attempt)
        self._ask(worker, worker.actor.move, attempt.batch.entries, others)

    def _has_others(self, worker: _DrivenWorker, attempt: Attempt) -> bool:
        """Whether another node may have what this one lacks."""
        bad = attempt.avoid | {worker.node} | self._foreign.keys()
        return any(
            node not in bad and (attempt.pair, node) not in self._unfit
            for node in self._list_nodes()
        )

    # What workers answer.

    def _wait(self) -> list[Any]:
        """The answers that come within a second.

        Raises:
            ProLoRAError: no node has had room for a worker for a long time, or Ray's own processes
                have ended.
        """
        self._vitals.check()
        ready, _ = self._ray.wait([*self._busy, *self._closing], num_returns=1, timeout=1.0)
        for ref in ready:
            if ref in self._closing:
                self._kill(self._closing.pop(ref))
        if ready:
            return [ref for ref in ready if ref in self._busy]
        waiting = [worker for worker in self._busy.values() if worker.location is None]
        if len(waiting) < len(self._busy):
            self._pass_on(waiting)
        elif time.monotonic() - self._last_success > _PATIENCE_SECONDS:
            raise ProLoRAError(
                f"no node of the Ray cluster has had room for a worker for "
                f"{_PATIENCE_SECONDS:.0f} s; one needs {self._needs}"
            )
        return []

    def _watch(self) -> Iterator[Record | None]:
        """Asks the workers how far they are, and gives up those that do not get on."""
        limit, now = self._settings.time_limit, time.monotonic()
        if now - self._asked < min(_ASK_SECONDS, limit / 4):
            return
        self._asked = now
        for ref, worker in list(self._closing.items()):
            if now - worker.moved > limit:
                self._kill(self._closing.pop(ref))
        for ref, worker in list(self._busy.items()):
            if worker.location is None:
                continue
            if self._has_got_on(worker):
                worker.moved = now
                yield None
            elif now - worker.moved > limit:
                del self._busy[ref]
                yield from self._replace(worker, f"it did not get on for {limit:g} s", hung=True)

    def _has_got_on(self, worker: _DrivenWorker) -> bool:
        """Whether a worker has done another step since it was asked last, as far as it says."""
        steps = worker.steps
        if worker.question is not None:
            ready, _ = self._ray.wait([worker.question], num_returns=1, timeout=0)
            if not ready:
                return False
            with suppress(Exception):  # of Ray: it is lost, which its other answer shows
                worker.steps = self._ray.get(worker.question)
        worker.question = worker.actor.count_steps.remote()
        return worker.steps > steps

    def _pass_on(self, waiting: list[_DrivenWorker]) -> None:
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

    def _look_around(self, worker: _DrivenWorker, location: Location) -> None:
        worker.location = location
        if location.version != __version__:
            problem = f"has prolora {location.version}, and not {__version__}"
            self._leave(worker, problem)
            return
        marks = self._folder_mark.renew(), self._cache_mark and self._cache_mark.renew()
        self._ask(worker, worker.actor.look_around, *marks)

    def _open(self, worker: _DrivenWorker, found: Surroundings) -> None:
        if not found.has_folder:
            self._leave(worker, f"has another folder of the name {self._settings.folder}")
            return
        if not found.has_cache and worker.node not in self._shipped:
            self._shipped.add(worker.node)
            self._ship(worker, found.bases)
        self._ask(worker, worker.actor.open)

    def _begin(self, worker: _DrivenWorker, opening: Opening) -> None:
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

    def _finish(self, worker: _DrivenWorker, moved: Moved) -> Iterator[Record]:
        attempt, worker.attempt = worker.attempt, None
        assert attempt is not None and worker.location is not None
        if moved.missing:
            self._queue.return_elsewhere(moved.missing, attempt, worker.node)
        several = len(self._list_nodes()) > 1
        self._queue.note_success()
        for record in moved.records:
            if several and record.status == "failed":
                record = replace(record, reason=f"{record.reason} [{worker.location.name}]")
            yield record
        self._idle.append(worker)

    # Workers that come and go.

    def _leave(self, worker: _DrivenWorker, problem: str) -> None:
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

    def _replace(self, worker: _DrivenWorker, why: str, hung: bool = False) -> Iterator[Record]:
        """Takes back the batch of a lost worker; gives the records of LoRAs that are given up.

        Raises:
            ProLoRAError: workers do not even start, or hang one after the other.
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
        if hung:
            given_up = self._queue.return_hung(worker.attempt)
            error: ProLoRAError = HungWorker(f"its process on {where} was ended: {why}")
        else:
            given_up = self._queue.return_lost(worker.attempt)
            reason = f"its process ended each time that it was tried, at last on {where}: {why}"
            error = LostWorker(reason)
        for entry in given_up:
            yield Record.of_failure(self._settings.plan.key(entry), entry, error)

    def _retire(self, worker: _DrivenWorker) -> None:
        """Lets a worker save what it has learnt, after which it is ended."""
        worker.moved = time.monotonic()
        self._closing[worker.actor.close.remote()] = worker

    def _kill(self, worker: _DrivenWorker) -> None:
        with suppress(Exception):
            self._ray.kill(worker.actor)

    def _ship(self, worker: _DrivenWorker, held: frozenset[str]) -> None:
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
                sent = worker.actor.receive.remote(name, entry.path.read_bytes())
                problem = self._ray.get(sent, timeout=self._settings.time_limit)
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
                closing = list(self._closing)
                self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        for worker in self._closing.values():
            self._kill(worker)
        for mark in (self._folder_mark, self._cache_mark):
            if mark is not None:
                mark.remove()


def _is_portable(path: Path, kind: str) -> bool:
    """Whether a file of a cache is true on another machine: an index is of this one's files."""
    return kind == "basis" or (kind == "table" and path.name.startswith("pairs-"))
