"""The engine Ray: workers on one machine or many, each with one pair of bases."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack
from typing import Any

from ....errors import ProLoRAError
from ....files.sizes import parse_limit
from ..plan import Batch
from ..records import Record
from ..worker import RunSettings
from .ray_driver import RayDriver
from .ray_session import connect_ray, divide_cluster
from .ray_vitals import find_vitals


class RayEngine:
    """Workers of Ray, as many as the cluster has room for or as were asked for.

    A worker is an actor with the bases of one pair open. It has one batch at a time, so that the
    memory of this process does not grow with the plan, and it stays as long as there is work for
    its pair.
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
            retries: how often a batch is given again whose worker was lost.

        Raises:
            ProLoRAError: Ray is not installed, does not start, or cannot be reached.
        """
        self._workers, self._gpus, self._retries = workers, gpus_per_worker or 0.0, retries
        self._is_alone = address is None
        self._stack = ExitStack()
        self._ray: Any = self._stack.enter_context(connect_ray(address, workers, self._gpus))

    def run(self, batches: Iterable[Batch], settings: RunSettings) -> Generator[Record | None]:
        """See `Engine.run`; the records of a batch come together.

        Raises:
            OutputError: no node has the folder of the results.
            ProLoRAError: no node has room for a worker, workers do not start or hang one after the
                other, or Ray's own processes have ended.
        """
        memory = parse_limit(settings.max_memory) or 0
        needs = divide_cluster(self._ray.nodes(), self._workers, self._gpus, memory)
        if self._is_alone and not needs.room:
            raise ProLoRAError(f"this machine has no room for a worker, which needs {needs}")
        driver = RayDriver(self._ray, needs, settings, self._retries, find_vitals(self._ray))
        try:
            yield from driver.run(batches)
        finally:
            driver.close()

    def close(self) -> None:
        """Stops Ray if it was started here, or leaves the cluster."""
        self._stack.close()
