"""What prolora uses of Ray, in this process: nodes that lack something, workers that are lost."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

from prolora.version import __version__
from prolora.workflow.fleet.engines.ray_worker import (
    Location,
    Opening,
    RayWorker,
    Surroundings,
)


@dataclass
class StandIn:
    """A cluster with a core on each node.

    Attributes:
        names: of the nodes.
        lacks: node -> names of LoRAs, labels of bases, "folder" or "cache".
        versions: node -> of prolora.
        received: (node, file) of a cache that was shipped, in order.
    """

    names: list[str]
    lacks: dict[str, set[str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    received: list[tuple[str, str]] = field(default_factory=list)
    started: int = 0

    def nodes(self):
        resources = {"CPU": 1.0}
        return [{"NodeID": n, "Alive": True, "Resources": resources} for n in self.names]

    def remote(self, cls):
        assert cls is RayWorker
        return self

    def options(self, scheduling_strategy=None, **needs):
        node = scheduling_strategy or self.names[self.started % len(self.names)]
        self.started += 1
        return SimpleNamespace(remote=lambda *what: _Actor(_NodeWorker(self, node, *what)))

    def wait(self, refs, num_returns, timeout):
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref, timeout=None):
        return ref.run()

    def kill(self, actor):
        actor.worker.close()


@dataclass
class _Actor:
    worker: RayWorker

    def __getattr__(self, name):
        method = getattr(self.worker, name)
        return SimpleNamespace(remote=lambda *what: _Ref(lambda: method(*what)))


class _Ref:
    def __init__(self, run):
        self.run = run


class _NodeWorker(RayWorker):
    def __init__(self, cluster, node, pair, settings):
        super().__init__(pair, settings)
        self.cluster, self.node = cluster, node
        self.lacks = cluster.lacks.get(node, set())

    def locate(self):
        version = self.cluster.versions.get(self.node, __version__)
        return Location(self.node, f"machine-{self.node}", 0, version)

    def look_around(self, folder_mark, cache_mark):
        assert folder_mark.exists() and (cache_mark is None or cache_mark.exists())
        return Surroundings("folder" not in self.lacks, "cache" not in self.lacks)

    def receive(self, name, content):
        self.cluster.received.append((self.node, name))
        return ""

    def open(self):
        opening = super().open()
        return Opening(f"no {self._pair.target}") if self._pair.target in self.lacks else opening

    def move(self, entries, others):
        assert not self.lacks & {self._pair.target, "folder"}
        assert self.locate().version == __version__
        missing = [e for e in entries if others and Path(e.lora).name in self.lacks]
        moved = super().move([e for e in entries if e not in missing], False)
        return replace(moved, missing=tuple(missing))
