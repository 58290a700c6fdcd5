"""Independent matrices over the cores: one pool for all callers."""

import threading
import time

import pytest
import torch

from prolora.core.parallel import map_on_threads


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def look(_):
    time.sleep(0.05)
    return threading.get_ident(), torch.get_num_threads()


def test_a_second_caller_shares_the_pool_of_the_first(four_threads):
    map_on_threads(look, range(4))
    seen = {}

    def call(name):
        before = torch.get_num_threads()
        seen[name] = before, map_on_threads(look, range(8))

    callers = [threading.Thread(target=call, args=(name,)) for name in "ab"]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [seen[name][0] for name in "ab"] == [4, 4]
    workers = {name: {ident for ident, _ in seen[name][1]} for name in "ab"}
    assert len(workers["a"] | workers["b"]) == 4
    assert all(threads == 1 for name in "ab" for _, threads in seen[name][1])
    assert torch.get_num_threads() == 4


def test_few_items_share_all_threads(four_threads):
    assert [threads for _, threads in map_on_threads(look, range(2))] == [2, 2]


def test_an_error_comes_back_when_every_item_has_ended(four_threads):
    ended = []

    def job(i):
        if i == 0:
            raise ValueError("the first")
        time.sleep(0.05)
        ended.append(i)

    with pytest.raises(ValueError, match="the first"):
        map_on_threads(job, range(4))
    count = len(ended)
    time.sleep(0.1)
    assert len(ended) == count
