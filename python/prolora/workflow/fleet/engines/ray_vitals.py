"""Whether Ray's own processes live: a driver would wait for dead ones a minute and more."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ....errors import ProLoRAError

# Between two looks, until a connection counts as failed, and how many must fail in turn.
_LOOK_SECONDS, _CONNECT_SECONDS, _FAILURES = 1.0, 2.0, 3


@dataclass
class RayVitals:
    """The processes without which nothing gets on, by the ports at which they listen.

    Attributes:
        services: name for messages, host and port of each.
    """

    services: Sequence[tuple[str, str, int]]
    _failures: dict[str, int] = field(default_factory=dict)
    _looked: float = 0.0

    def check(self) -> None:
        """Looks, at most once a second.

        Raises:
            ProLoRAError: one of them has not answered several times.
        """
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        for name, host, port in self.services:
            try:
                socket.create_connection((host, port), _CONNECT_SECONDS).close()
                self._failures[name] = 0
            except OSError as error:
                self._failures[name] = self._failures.get(name, 0) + 1
                if self._failures[name] >= _FAILURES:
                    raise ProLoRAError(
                        f"{name} at {host}:{port} has ended: {error}. What is done is kept; run "
                        "again to go on"
                    ) from error
        self._looked = time.monotonic()


def find_vitals(ray: Any) -> RayVitals:
    """The head of the cluster and the node of this process.

    Args:
        ray: the module, connected. A client of a cluster ("ray://…") sees no such processes.
    """
    services = []
    with suppress(Exception):
        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        services.append(("the head process of Ray (gcs_server)", host.strip("[]"), int(port)))
        for node in ray.nodes():
            if node["NodeID"] == context.get_node_id():
                place = node["NodeManagerAddress"], int(node["NodeManagerPort"])
                services.append(("the process of Ray on this machine (raylet)", *place))
    return RayVitals(services)
