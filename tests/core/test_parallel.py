"""Independent matrices over the cores: one pool for all callers."""

import threading
import time

import pytest
import torch

from prolora.core.parallel import map_on_threads


@pytest.fixture(params=[4])
def threads(request):
    """How many the process may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def look(_):
    time.sleep(0.05)
    return threading.get_ident(), torch.get_num_threads()


def test_a_second_caller_shares_the_pool_of_the_first(threads):
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
    assert [before for before, _ in seen.values()] == [4, 4]
    looks = [one for _, found in seen.values() for one in found]
    assert len({ident for ident, _ in looks}) == 4 and {count for _, count in looks} == {1}
    assert torch.get_num_threads() == 4


def test_few_items_share_all_threads(threads):
    assert [threads for _, threads in map_on_threads(look, range(2))] == [2, 2]


def test_an_error_comes_back_when_every_item_has_ended(threads):
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


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_tensors_on_a_gpu_are_worked_on_in_turn_by_the_calling_thread(threads):
    """In the caller's stream; the meta device stands for a GPU, which has no threads to share."""
    here = threading.get_ident()
    on_gpu = [(torch.empty(2, device="meta"), [torch.empty(2)])] * 4
    assert {ident for ident, _ in map_on_threads(look, on_gpu)} == {here}
    others = {ident for ident, _ in map_on_threads(look, [torch.empty(2)] * 4)}
    assert (others == {here}) == (threads == 1)
