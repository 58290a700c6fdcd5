"""The engine Ray: workers on one machine or many, which batches are given to."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ....errors import OutputError, ProLoRAError
from ....files.sizes import parse_limit
from ....version import __version__
from ..plan import Batch, Entry
from ..records import Record
from ..worker import RunSettings
from .attempts import Attempt, AttemptQueue, HungWorker, LostWorker
from .ray_session import WorkerNeeds, connect_ray, divide_cluster, shorten
from .ray_vitals import RayVitals, find_vitals
from .ray_worker import Arrival, RayWorker

# How long a run waits for room for its first worker: other jobs may end, machines may be added.
_PATIENCE_SECONDS = 600.0
_CLOSE_SECONDS = 10.0

log = logging.getLogger(__name__)


class RayEngine:
    """Workers of Ray, as many as the cluster has room for or as were asked for.

    A worker has one batch at a time, so that the memory of this process does not grow with the
    plan, and it stays as long as there is work.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        gpus_per_worker: float | None = None,
        retries: int = 2,
    ) -> None:
        """Connects to a cluster, or starts Ray on this machine.

        Args:
            address: of the cluster, "host:6379" or "auto"; None takes the connection that the
                caller has, or starts a Ray that lives as long as this engine.
            workers: how many at a time; None means one for each core, or as many as the GPUs have
                room for.
            gpus_per_worker: share of a GPU that each takes; None means none.
            retries: how often a LoRA is given again that a worker was lost with.

        Raises:
            ProLoRAError: Ray is not installed, does not start, or cannot be reached.
        """
        self._workers, self._gpus, self._retries = workers, gpus_per_worker or 0.0, retries
        self._is_alone = address is None
        self._stack = ExitStack()
        self._ray: Any = self._stack.enter_context(connect_ray(address, workers, self._gpus))

    def run(self, batches: Iterable[Batch], settings: RunSettings) -> Generator[Record | None]:
        """See `Engine.run`.

        Raises:
            OutputError: no node has the folder of the results.
            ProLoRAError: no node has room for a worker, workers do not start or hang one after the
                other, or Ray's own processes have ended.
        """
        nodes, memory = self._ray.nodes(), parse_limit(settings.max_memory) or 0
        needs = divide_cluster(nodes, self._workers, self._gpus, memory)
        if self._is_alone and not needs.list_fitting(nodes):
            raise ProLoRAError(f"this machine has no room for a worker, which needs {needs}")
        driver = RayDriver(self._ray, needs, settings, self._retries, find_vitals(self._ray))
        try:
            yield from driver.run(batches)
        finally:
            driver.close()

    def close(self) -> None:
        """Stops Ray if it was started here, or leaves the cluster."""
        self._stack.close()


@dataclass(eq=False)
class _DrivenWorker:
    """An actor, as the driver sees it.

    Attributes:
        actor: the handle.
        attempt: what it was given last.
        answers: what it says to that.
        left: key -> LoRA of which it has not said what became.
        elsewhere: LoRAs that this node does not have, and another may.
        arrival: where it runs; None until it does.
        moved: when it said something, or was given something to do, by the driver's clock.
    """

    actor: Any
    attempt: Attempt
    answers: Any = None
    left: dict[str, Entry] = field(default_factory=dict)
    elsewhere: list[Entry] = field(default_factory=list)
    arrival: Arrival | None = None
    moved: float = 0.0

    @property
    def node(self) -> str:
        """The id of its node; "" until it runs."""
        return self.arrival.node if self.arrival else ""

    @property
    def place(self) -> str:
        """Where it runs, for messages."""
        return self.arrival.name if self.arrival else "a node"


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
            retries: how often a LoRA is given again that a worker was lost with.
            vitals: whether Ray's own processes live; None asks nobody.
        """
        self._ray, self._needs, self._retries = ray, needs, retries
        self._vitals = vitals or RayVitals([])
        if needs.gpus and settings.device is None:
            settings = replace(settings, device="cuda")
        self._settings = settings
        self._class = ray.remote(RayWorker)
        self._busy: list[_DrivenWorker] = []
        self._closing: list[Any] = []  # what Ray answers with
        self._foreign: dict[str, str] = {}
        self._failed_starts = 0
        self._heard = time.monotonic()

    def run(self, batches: Iterable[Batch]) -> Iterator[Record | None]:
        """The records of all batches, and None whenever a worker has got on.

        Raises:
            OutputError: no node has the folder of the results.
            ProLoRAError: no node has room for a worker, workers do not start or hang one after the
                other, or Ray's own processes have ended.
        """
        self._queue = AttemptQueue(batches, self._retries, self._needs.most)
        while self._hand_out():
            for worker in self._wait():
                yield from self._hear(worker)
            limit = self._settings.time_limit
            for worker in list(self._busy):
                if worker.arrival and time.monotonic() - worker.moved > limit:
                    yield from self._lose(worker, f"it did not get on for {limit:g} s", hung=True)

    def _hand_out(self) -> bool:
        """Starts workers, as long as there is work for more; whether any is at work."""
        while len(self._busy) < self._needs.most and (attempt := self._queue.take()):
            at_work = {worker.node for worker in self._busy if worker.arrival}
            if attempt.avoid and at_work - attempt.avoid:
                self._queue.put_back(attempt)  # one of them takes it next
                break
            self._give(self._start(attempt), attempt)
        return bool(self._busy)

    def _start(self, attempt: Attempt) -> _DrivenWorker:
        """Starts a worker, on a node that may have what an attempt needs."""
        bad = attempt.avoid | self._foreign.keys()
        options: dict[str, Any] = {"num_cpus": self._needs.cores, "num_gpus": self._needs.gpus}
        if self._needs.memory:
            options["memory"] = self._needs.memory
        good = [node for node in self._list_nodes() if node not in bad]
        if bad and good:
            options["scheduling_strategy"] = self._pin(good)
        actor = self._class.options(max_restarts=0, **options).remote(self._settings)
        return _DrivenWorker(actor, attempt)

    def _pin(self, nodes: list[str]) -> Any:
        """Lets Ray start a worker on the one of these nodes that has the fewest of ours."""
        taken = [worker.node for worker in self._busy]
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        node = min(nodes, key=taken.count)
        return strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    def _list_nodes(self) -> list[str]:
        self._vitals.check()
        return self._needs.list_fitting(self._ray.nodes())

    def _give(self, worker: _DrivenWorker, attempt: Attempt) -> None:
        worker.attempt, worker.moved = attempt, time.monotonic()
        worker.left = {self._settings.plan.key(entry): entry for entry in attempt.batch.entries}
        move = worker.actor.move.options(num_returns="streaming")
        worker.answers = move.remote(attempt.batch, __version__)
        self._busy.append(worker)

    def _wait(self) -> list[_DrivenWorker]:
        """The workers that have something to say within a second.

        Raises:
            ProLoRAError: no node has had room for a worker for a long time, or Ray's own processes
                have ended.
        """
        self._vitals.check()
        waiting = [worker.answers for worker in self._busy]
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=1.0)
        if ready:  # all of them, so that none is taken for one that does not get on
            ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        patience = time.monotonic() - self._heard
        if patience > _PATIENCE_SECONDS and not any(worker.arrival for worker in self._busy):
            raise ProLoRAError(
                f"no node of the Ray cluster has had room for a worker for "
                f"{_PATIENCE_SECONDS:.0f} s; one needs {self._needs}"
            )
        return [worker for worker in self._busy if worker.answers in ready]

    def _hear(self, worker: _DrivenWorker) -> Iterator[Record | None]:
        """Takes the next answer of a worker."""
        worker.moved = self._heard = time.monotonic()
        try:
            answer = self._ray.get(next(worker.answers))
        except StopIteration:
            yield from self._finish(worker)
        except Exception as error:  # of Ray; our own come as records
            yield from self._lose(worker, shorten(error))
        else:
            if isinstance(answer, Arrival):
                worker.arrival, self._failed_starts = answer, 0
                if answer.problem:
                    self._leave(worker, answer)
            elif answer is None:
                yield None
            else:
                yield from self._note(worker, answer)

    def _note(self, worker: _DrivenWorker, record: Record) -> Iterator[Record]:
        """Passes a record on, or keeps the LoRA for a node that may have what this one lacks."""
        self._queue.note_success()
        entry = worker.left.pop(record.key, None)  # which a plan may name twice
        if record.status == "failed":
            nodes = self._list_nodes()
            bad = worker.attempt.avoid | {worker.node} | self._foreign.keys()
            if entry and record.transient and not bad.issuperset(nodes):
                worker.elsewhere.append(entry)
                return
            if len(nodes) > 1:
                words = {"message": f"{record.reason} [{worker.place}]"}
                record = replace(record, error=record.error | words)
        yield record

    def _finish(self, worker: _DrivenWorker) -> Iterator[Record]:
        """Gives a worker that has done its batch another one, or lets it end."""
        if worker.left:
            yield from self._lose(worker, "it did not say what became of all LoRAs")
            return
        self._busy.remove(worker)
        self._return_elsewhere(worker)
        attempt = None if worker.node in self._foreign else self._queue.take(worker.node)
        if attempt is not None:
            self._give(worker, attempt)
        else:  # it saves what it has learnt; without a handle it ends after that
            self._closing.append(worker.actor.close.remote())

    def _return_elsewhere(self, worker: _DrivenWorker) -> None:
        if worker.elsewhere:
            self._queue.return_elsewhere(worker.attempt.narrow(worker.elsewhere), worker.node)
        worker.elsewhere = []

    def _leave(self, worker: _DrivenWorker, arrival: Arrival) -> None:
        """Uses a node no more.

        Raises:
            OutputError: no node is left.
        """
        self._foreign[arrival.node] = f"{arrival.name} {arrival.problem}"
        self._queue.put_back(worker.attempt)
        worker.left = {}
        if self._foreign.keys() >= set(self._list_nodes()):
            raise OutputError(
                f"no node of the Ray cluster can work on {self._settings.folder}: "
                f"{'; '.join(self._foreign.values())}. All nodes need the same folder of results "
                "under the same path (a network drive), and the same version of prolora"
            )

    def _lose(self, worker: _DrivenWorker, why: str, hung: bool = False) -> Iterator[Record]:
        """Takes back what a lost worker has not done; gives the records of what is given up.

        Raises:
            ProLoRAError: workers do not even start, or hang one after the other.
        """
        self._kill(worker)
        self._busy.remove(worker)
        log.warning("a worker on %s was lost: %s", worker.place, why)
        self._return_elsewhere(worker)
        left = worker.attempt.narrow(worker.left.values())
        if worker.arrival is None:
            self._failed_starts += 1
            if self._failed_starts > self._retries:
                raise ProLoRAError(f"workers of Ray do not start: {why}")
            self._queue.put_back(left)
            return
        error: ProLoRAError = HungWorker(f"its process on {worker.place} was ended: {why}")
        if not hung:
            reason = "its process ended each time that it was tried, at last on"
            error = LostWorker(f"{reason} {worker.place}: {why}")
        for entry in self._queue.return_lost(left, hung):
            yield Record.of_failure(self._settings.plan.key(entry), entry, error)

    def _kill(self, worker: _DrivenWorker) -> None:
        with suppress(Exception):
            self._ray.kill(worker.actor)

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._busy:
            self._kill(worker)
        self._busy = []
        if self._closing:
            with suppress(Exception):
                self._ray.wait(
                    self._closing, num_returns=len(self._closing), timeout=_CLOSE_SECONDS
                )
