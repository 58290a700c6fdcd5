"""What becomes of the batches of lost workers, and what a cluster has room for; without Ray."""

import sys

import pytest

import prolora
from prolora.errors import InvalidOption, ProLoRAError
from prolora.workflow.fleet.engines import ray_session
from prolora.workflow.fleet.engines.attempts import AttemptQueue
from prolora.workflow.fleet.engines.ray_session import divide_cluster
from prolora.workflow.fleet.plan import Batch, Entry, PairOfBases

PAIR = PairOfBases("source", "target")


def batch(names):
    return Batch(PAIR, tuple(Entry(name, PAIR) for name in names))


def run(queue, killing):
    """Takes all batches; those with one of these LoRAs lose their worker. Tries and failures."""
    tries, failed = [], []
    while attempt := queue.take():
        names = "".join(entry.lora for entry in attempt.batch.entries)
        tries.append(names)
        if set(names) & set(killing):
            failed += [entry.lora for entry in queue.return_lost(attempt)]
    return tries, failed


def test_the_batch_of_a_lost_worker_is_given_again_one_lora_at_a_time():
    queue = AttemptQueue([batch("abc"), batch("de")], retries=2)
    assert run(queue, "b") == (["abc", "a", "b", "c", "b", "b", "de"], ["b"])


def test_without_retries_a_batch_is_tried_once_and_each_of_its_loras_once():
    assert run(AttemptQueue([batch("ab")], retries=0), "a") == (["ab", "a", "b"], ["a"])


def test_batches_are_taken_no_earlier_than_they_are_asked_for():
    taken = []
    queue = AttemptQueue((taken.append(name) or batch(name) for name in "abc"), retries=1)
    first = queue.take()
    queue.return_lost(first)
    assert queue.take().batch == first.batch and taken == ["a"]  # one LoRA is a batch


def test_what_a_node_lacks_is_tried_elsewhere():
    queue = AttemptQueue([batch("ab")], retries=1)
    first = queue.take()
    queue.return_elsewhere(first.narrow(first.batch.entries[:1]), "node-1")
    second = queue.take()
    assert second.batch.entries == first.batch.entries[:1] and second.avoid == {"node-1"}


def node(name, alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    "workers, gpus, memory, expected",
    [
        (None, 0, 0, (1, 12)),  # one a core
        (2, 0, 0, (4, 2)),  # more cores each, as many as the smaller node has
        (3, 0, 0, (4, 3)),
        (None, 0.5, 0, (2, 4)),  # two on each GPU, which have the cores of their node
        (None, 0.4, 0, (2, 4)),  # shares of different GPUs do not add up
        (None, 0, 6 << 30, (2, 5)),
        (40, 0, 0, (1, 40)),  # more may come
    ],
)
def test_a_worker_gets_the_cores_that_there_are_for_so_many(workers, gpus, memory, expected):
    nodes = [
        node("a", CPU=8.0, GPU=2.0, memory=26.0 * 2**30),
        node("b", CPU=4.0, memory=10.0 * 2**30),
        node("gone", alive=False, CPU=64.0, GPU=8.0),
    ]
    needs = divide_cluster(nodes, workers, gpus, memory)
    assert (needs.cores, needs.most) == expected
    assert needs.list_fitting(nodes) == (["a"] if gpus else ["a", "b"])


def test_without_ray_the_way_to_install_it_is_named(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ProLoRAError, match=r"pip install 'prolora\[ray\]'"):
        prolora.migrate(plan, tmp_path / "moved", engine="ray")
    assert not (tmp_path / "moved").exists()


def test_an_address_at_which_nothing_listens_is_refused_at_once():
    with pytest.raises(ProLoRAError, match=r"127\.0\.0\.1:9 cannot be reached.*ray status"):
        ray_session._check_reachable("127.0.0.1:9")


@pytest.mark.parametrize("options", [{"workers": 0}, {"gpus_per_worker": -1.0}])
def test_impossible_options_of_the_engine_are_refused(plan, tmp_path, options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        prolora.migrate(plan, tmp_path / "moved", engine="ray", **options)
