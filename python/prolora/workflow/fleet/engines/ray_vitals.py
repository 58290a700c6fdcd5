"""Whether Ray's own processes live: a driver would wait for dead ones a minute and more."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ....errors import ProLoRAError

# Between two looks, until a connection counts as failed, and how many must fail in turn.
_LOOK_SECONDS, _CONNECT_SECONDS, _FAILURES = 1.0, 2.0, 3


class RayVitals:
    """The processes without which nothing gets on, by the ports at which they listen."""

    def __init__(self, services: Sequence[tuple[str, str, int]]) -> None:
        """Looks at nothing yet.

        Args:
            services: name for messages, host and port of each.
        """
        self._services = {service: 0 for service in services}
        self._looked = 0.0

    def check(self) -> None:
        """Looks, at most once a second.

        Raises:
            ProLoRAError: one of them has not answered several times.
        """
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        for service, failures in self._services.items():
            name, host, port = service
            try:
                socket.create_connection((host, port), _CONNECT_SECONDS).close()
                self._services[service] = 0
            except OSError as error:
                self._services[service] = failures + 1
                if failures + 1 >= _FAILURES:
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
