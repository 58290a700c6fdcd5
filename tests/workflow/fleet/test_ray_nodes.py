"""Nodes of a cluster that lack something, with a stand-in for Ray."""

import json
from dataclasses import replace

import pytest
from fleet_files import results
from ray_stand_in import StandIn

import prolora
from prolora.errors import OutputError
from prolora.workflow.fleet.engines.ray_engine import RayDriver
from prolora.workflow.fleet.engines.ray_session import divide_cluster

UNKNOWN = "machine-"


class StandInEngine:
    """The engine ray on a stand-in."""

    def __init__(self, cluster):
        self.cluster = cluster

    def run(self, batches, settings):
        needs = divide_cluster(self.cluster.nodes(), None, 0, 0)
        driver = RayDriver(self.cluster, needs, settings, 1)
        try:
            yield from driver.run(batches)
        finally:
            driver.close()

    def close(self):
        pass


@pytest.fixture
def migrate(plan, tmp_path, monkeypatch):
    """The plan on a cluster; the summary, and whether its files are those of one process."""
    monkeypatch.setattr(RayDriver, "_pin", lambda self, nodes: nodes[0])
    prolora.migrate(plan, tmp_path / "alone", cache=tmp_path / "cache")

    def run(cluster, **options):
        out = tmp_path / "moved"
        options = {"cache": tmp_path / "cache", "engine": StandInEngine(cluster)} | options
        summary = prolora.migrate(plan, out, **options)
        assert not list(out.glob(".*"))
        return summary, results(out) == results(tmp_path / "alone")

    return run


@pytest.mark.parametrize(
    "lacks",
    [{"a.safetensors"}, {"target"}, {"folder"}, {"target2", "c.safetensors"}],
    ids=lambda lacks: "-".join(sorted(lacks)),
)
def test_what_one_node_lacks_is_done_on_another(migrate, lacks):
    cluster = StandIn(["1", "2"], {"1": lacks})
    summary, equal = migrate(cluster)
    assert equal and (summary.count("done"), summary.count("failed")) == (8, 0)
    assert len(cluster.moved) == 8  # none of them twice


def test_a_node_with_another_version_is_not_used(migrate):
    cluster = StandIn(["1", "2"], {"2": set()}, {"1": "0.0"})
    assert migrate(cluster)[1]


def test_what_no_node_has_fails_with_the_names_of_the_nodes(migrate, plan, tmp_path):
    for path in tmp_path.glob("loras/c.safetensors"):
        path.unlink()
    summary, _ = migrate(StandIn(["1", "2"]), retries=0)
    assert (summary.count("done"), summary.count("failed")) == (6, 2)
    lines = (tmp_path / "moved" / "failed.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["error"]["message"] for line in lines]
    assert sum("c.safetensors" in reason and UNKNOWN in reason for reason in reasons) == 2


def test_a_folder_that_no_node_has_ends_the_run(migrate):
    cluster = StandIn(["1", "2"], {"1": {"folder"}, "2": {"folder"}})
    with pytest.raises(OutputError, match=r"machine-1 has another folder.*machine-2 has another"):
        migrate(cluster)


def test_a_move_that_a_plan_names_twice_is_done_once(plan, tmp_path):
    doubled = replace(plan, entries=[entry for entry in plan.entries for _ in range(2)])
    cluster = StandIn(["1", "2"])
    summary = prolora.migrate(doubled, tmp_path / "moved", engine=StandInEngine(cluster))
    assert (summary.count("done"), summary.count("failed")) == (16, 0)
    assert len(results(tmp_path / "moved")) == 8
