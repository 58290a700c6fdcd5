"""Stacks are read and copied ahead of the work: in which order, how many, how they end."""

import weakref
from functools import partial

import pytest
import torch
from mini import write_case

import prolora
from prolora.bases import upload
from prolora.bases.upload import work_ahead, work_in_turn


class RecordedCopies:
    """Copies on the CPU that note when they begin and end."""

    def __init__(self, log):
        self.log = log

    def start(self, tensors):
        self.log.append(f"copy {int(tensors[0])}")
        return [x.clone() for x in tensors]

    def finish(self, copies):
        self.log.append(f"wait {int(copies[0])}")
        return copies


def at_once(job):
    """In place of a thread: the job is done where it is submitted."""
    try:
        result = job()
    except ValueError as error:
        failure = error

        def fail():
            raise failure

        return fail
    return lambda: result


@pytest.mark.parametrize("threads", [False, True])
def test_at_most_two_stacks_are_alive(threads, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Stack(torch.Tensor):
        pass

    def read(i):
        stack = torch.ones(3).as_subclass(Stack)
        alive.add(stack)
        return i, [stack]

    class Kept(RecordedCopies):
        def start(self, tensors):
            return tensors

        finish = start

    def work(i, weights):
        most.append(len(alive))
        return i

    readers = (partial(read, i) for i in range(6))
    if threads:
        monkeypatch.setattr(upload, "GpuCopies", Kept)
        assert list(work_in_turn(readers, work, torch.device("cuda"))) == list(range(6))
    else:
        assert list(work_ahead(readers, work, Kept([]), at_once)) == list(range(6))
    assert max(most) <= 2


@pytest.mark.parametrize("threads", [False, True])
def test_what_a_reader_raises_comes_in_its_turn_and_nothing_is_read_after_it(threads, monkeypatch):
    read_so_far, worked = [], []

    def read(i):
        read_so_far.append(i)
        if i == 2:
            raise ValueError("cannot be read")
        return i, [torch.tensor(i)]

    readers = (partial(read, i) for i in range(9))

    def work(i, weights):
        worked.append(i)

    if threads:
        monkeypatch.setattr(upload, "GpuCopies", lambda device: RecordedCopies([]))
        results = work_in_turn(readers, work, torch.device("cuda"))
    else:
        results = work_ahead(readers, work, RecordedCopies([]), at_once)
    with pytest.raises(ValueError, match="cannot be read"):
        list(results)
    assert worked == [0, 1] and read_so_far in ([0, 1, 2], [0, 1, 2, 3])


def test_a_transfer_that_reads_ahead_gives_the_same_bits(tmp_path, monkeypatch):
    """As on a GPU, but that the copies stay on the CPU."""
    lora, source, target = write_case(tmp_path)

    def ahead(readers, work, device):
        return work_ahead(readers, work, RecordedAnywhere([]), at_once)

    class RecordedAnywhere(RecordedCopies):
        def start(self, tensors):
            return [x.clone() for x in tensors]

        def finish(self, copies):
            return copies

    results = []
    for reader in (work_in_turn, ahead):
        monkeypatch.setattr("prolora.bases.cache.basis_cache.work_in_turn", reader)
        moved = prolora.transfer(lora, source, target, method="prolora", rank=8, threshold=0)
        results.append(moved.state_dict())
    one, other = results
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
