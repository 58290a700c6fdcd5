"""Stacks are read and copied ahead of the work: in which order, how many, how they end."""

import weakref
from functools import partial

import pytest
import torch
from mini import write_case

import prolora
from prolora.bases import upload
from prolora.bases.upload import work_in_turn


class CopiesOnCpu:
    """What stands for copies to a GPU."""

    def __init__(self, device=None):
        pass

    def start(self, tensors):
        return tensors

    finish = start


def work_as_on_a_gpu(readers, work, device=None):
    return work_in_turn(readers, work, torch.device("cuda"))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(upload, "GpuCopies", CopiesOnCpu)


def test_at_most_two_stacks_are_alive():
    alive, most = weakref.WeakSet(), []

    class Stack(torch.Tensor):
        pass

    def read(i):
        stack = torch.ones(3).as_subclass(Stack)
        alive.add(stack)
        return i, [stack]

    def work(i, weights):
        most.append(len(alive))
        return i

    assert list(work_as_on_a_gpu((partial(read, i) for i in range(6)), work)) == list(range(6))
    assert max(most) <= 2


def test_what_a_reader_raises_comes_in_its_turn_and_nothing_is_read_after_it():
    read_so_far, worked = [], []

    def read(i):
        read_so_far.append(i)
        if i == 2:
            raise ValueError("cannot be read")
        return i, [torch.tensor(i)]

    readers = (partial(read, i) for i in range(9))
    with pytest.raises(ValueError, match="cannot be read"):
        list(work_as_on_a_gpu(readers, lambda i, weights: worked.append(i)))
    assert worked == [0, 1] and read_so_far in ([0, 1, 2], [0, 1, 2, 3])


def test_a_transfer_that_reads_ahead_gives_the_same_bits(tmp_path, monkeypatch):
    """As on a GPU, but that the copies stay on the CPU."""
    case, results = write_case(tmp_path), []
    for reader in (work_in_turn, work_as_on_a_gpu):
        monkeypatch.setattr("prolora.bases.cache.basis_cache.work_in_turn", reader)
        moved = prolora.transfer(*case, method="prolora", rank=8, threshold=0)
        results.append(moved.state_dict())
    one, other = results
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
