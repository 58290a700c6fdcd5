"""A connection to Ray: to a cluster that is there, or to one started for this call alone."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from ....errors import ProLoRAError
from .ray_minder import list_descendants, mind_processes

log = logging.getLogger(__name__)

# Ray itself tries for 80 s to reach an address at which nothing answers.
_CONNECT_SECONDS = 5.0
# About the least that Ray takes: batches and records are some kB each, and files of a cache that is
# shipped follow one another.
_OBJECT_STORE_BYTES = 100_000_000


def import_ray() -> Any:
    """The module ray.

    Raises:
        ProLoRAError: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ProLoRAError("the engine ray needs Ray: pip install 'prolora[ray]'") from error


@contextmanager
def connect_ray(address: str | None, workers: int | None, gpus: float) -> Iterator[Any]:
    """The module ray, connected; what was started here is stopped at the end, and nothing else.

    Args:
        address: of a cluster's head node as `ray.init` takes it ("host:6379", "auto"); None takes
            the connection that the caller has, or starts Ray on this machine, whether or not a
            cluster runs there.
        workers: processes at a time; None means one for each core.
        gpus: share of a GPU that a worker needs.

    Raises:
        ProLoRAError: Ray is not installed, the address cannot be reached, or Ray does not start.
    """
    ray = import_ray()
    if address is None and ray.is_initialized():
        yield ray
        return
    if ray.is_initialized():
        raise ProLoRAError(
            f"this process is connected to Ray, and the address {address} was given: "
            "leave out the address, or call ray.shutdown() before"
        )
    before = list_descendants(os.getpid())
    try:
        if address is None:
            _start_ray(ray, workers, gpus)
        else:
            _check_reachable(address)
            ray.init(address=address, **_QUIET)
    # Ray raises many kinds of errors, and leaves the process where a cluster does not answer.
    except (Exception, SystemExit) as error:
        ray.shutdown()
        if isinstance(error, ProLoRAError):
            raise
        what = "Ray on this machine cannot be started"
        if address is not None:
            what = f"the Ray cluster at {address} cannot be reached"
        raise ProLoRAError(f"{what}: {shorten(error)}") from error
    after = list_descendants(os.getpid())
    own = {process: began for process, began in after.items() if process not in before}
    with mind_processes(own) if address is None else nullcontext():
        try:
            with _log_messages():
                yield ray
        finally:
            ray.shutdown()


@contextmanager
def _log_messages() -> Iterator[None]:
    """Sends what Ray prints of lost workers to the log: standard output is the caller's.

    Ray has no option for this, so that its function is exchanged, where there is one.
    """
    internal: Any = importlib.import_module("ray._private.worker")
    printing = getattr(internal, "print_to_stdstream", None)
    if printing is None:
        yield
        return

    def keep(data: dict[str, Any], *_: object, **__: object) -> None:
        log.info("Ray: %s", "\n".join(map(str, data.get("lines", ()))))

    internal.print_to_stdstream = keep
    try:
        yield
    finally:
        internal.print_to_stdstream = printing


_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def _start_ray(ray: Any, workers: int | None, gpus: float) -> None:
    """Starts Ray on this machine, for this process alone."""
    cores = os.cpu_count() or 1
    ray.init(
        address="local",
        num_cpus=max(cores, workers or 0),
        num_gpus=None if gpus else 0,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        **_QUIET,
    )


def _check_reachable(address: str) -> None:
    """Refuses an address with a port at which nothing listens."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return  # "auto", or what Ray refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ProLoRAError(
            f"the Ray cluster at {address} cannot be reached: {error}; "
            "`ray status` on its head node shows whether it runs"
        ) from error


def shorten(error: BaseException) -> str:
    """The line of Ray's message that says why; the whole often fills a page."""
    if isinstance(error, SystemExit):
        return "Ray gave up waiting for it"
    error = getattr(error, "cause", None) or error  # what a method of an actor raised
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "died because" in line or "dead because" in line]
    line = (telling or lines or [type(error).__name__])[0]
    return line.partition(" Some common causes include")[0][:300]


@dataclass(frozen=True)
class WorkerNeeds:
    """What one worker takes of a node, and how many there may be.

    Attributes:
        cores: of the CPU, and so many threads.
        gpus: share of a GPU.
        memory: bytes that Ray sets aside; 0 sets none aside.
        most: workers at a time.
    """

    cores: int
    gpus: float
    memory: int
    most: int

    def __str__(self) -> str:
        """What a node must have."""
        parts = [f"{self.cores} cores"]
        parts += [f"{self.gpus:g} GPUs"] if self.gpus else []
        parts += [f"{self.memory / 2**30:.1f} GiB of memory"] if self.memory else []
        return ", ".join(parts)

    def list_fitting(self, nodes: Sequence[dict[str, Any]]) -> list[str]:
        """The ids of the nodes that are alive and can have such a worker.

        Args:
            nodes: as `ray.nodes()` gives them.
        """
        alive = [node for node in nodes if node["Alive"]]
        return [n["NodeID"] for n in alive if count_workers(n["Resources"], self)]


def count_workers(resources: dict[str, float], needs: WorkerNeeds) -> int:
    """How many workers fit on a node with these resources when nothing else runs there."""
    room = resources.get("CPU", 0.0) / needs.cores
    if needs.gpus:
        # Shares of different GPUs do not add up.
        room = min(room, resources.get("GPU", 0.0) * (1 // needs.gpus or 1 / needs.gpus))
    if needs.memory:
        room = min(room, resources.get("memory", 0.0) / needs.memory)
    return int(room)


def divide_cluster(
    nodes: Sequence[dict[str, Any]], workers: int | None, gpus: float, memory: int
) -> WorkerNeeds:
    """What each worker gets: as many cores as there are for so many workers.

    Args:
        nodes: as `ray.nodes()` gives them.
        workers: how many; None means one for each core, or as many as the GPUs have room for.
        gpus: share of a GPU for each.
        memory: bytes for each; 0 where there is no bound.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]

    def measure(cores: int) -> int:
        needs = WorkerNeeds(cores, gpus, memory, 0)
        return sum(count_workers(resources, needs) for resources in alive)

    most = workers or max(1, measure(1))
    largest = int(max((resources.get("CPU", 0.0) for resources in alive), default=1))
    enough = (cores for cores in range(largest, 1, -1) if measure(cores) >= most)
    return WorkerNeeds(next(enough, 1), gpus, memory, most)
