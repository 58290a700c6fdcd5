"""What prolora uses of Ray, in this process: nodes that lack something, workers that are lost."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

from prolora.errors import input_error
from prolora.version import __version__
from prolora.workflow.fleet.engines.ray_worker import Arrival, RayWorker
from prolora.workflow.fleet.records import Record


@dataclass
class StandIn:
    """A cluster with a core on each node.

    Attributes:
        names: of the nodes.
        lacks: node -> names of LoRAs, labels of bases, or "folder".
        versions: node -> of prolora.
        moved: (node, LoRA) of what was moved, in order.
    """

    names: list[str]
    lacks: dict[str, set[str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    moved: list[tuple[str, str]] = field(default_factory=list)
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
        return SimpleNamespace(remote=lambda settings: _Actor(_NodeWorker(self, node, settings)))

    def wait(self, waiting, num_returns, timeout):
        return waiting[:num_returns], waiting[num_returns:]

    def get(self, answer):
        return answer

    def kill(self, actor):
        actor.worker.close()


@dataclass
class _Actor:
    worker: RayWorker

    @property
    def move(self):
        method = SimpleNamespace(remote=self.worker.move)
        return SimpleNamespace(options=lambda num_returns: method)

    @property
    def close(self):
        return SimpleNamespace(remote=self.worker.close)


class _NodeWorker(RayWorker):
    def __init__(self, cluster, node, settings):
        lacks = cluster.lacks.get(node, set())
        bases = {
            label: replace(base, path=f"{base.path}-gone") if label in lacks else base
            for label, base in settings.plan.bases.items()
        }
        settings = replace(settings, plan=replace(settings.plan, bases=bases))
        if "folder" in lacks:
            settings = replace(settings, mark="/nowhere/mark")
        super().__init__(settings)
        self.cluster, self.node, self.lacks = cluster, node, lacks
        self._engine = _NodeEngine(self._engine, self)

    def locate(self):
        return Arrival(self.node, f"machine-{self.node}")

    def move(self, batch, version):
        assert version == __version__
        return super().move(batch, self.cluster.versions.get(self.node, version))


class _NodeEngine:
    """An engine on a node that lacks LoRAs."""

    def __init__(self, engine, worker):
        self.engine, self.worker = engine, worker

    def run(self, batches, settings):
        (batch,) = batches
        there = []
        for entry in batch.entries:
            if Path(entry.lora).name in self.worker.lacks:
                error = input_error(entry.lora, FileNotFoundError(2, "No such file"))
                error.__cause__ = FileNotFoundError()
                yield Record.of_failure(settings.plan.key(entry), entry, error)
            else:
                there.append(entry)
        for record in self.engine.run([replace(batch, entries=tuple(there))], settings):
            if record and record.status == "done":
                self.worker.cluster.moved.append((self.worker.node, record.lora))
            yield record

    def close(self):
        self.engine.close()
