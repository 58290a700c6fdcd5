"""Stacks taken whole, as a GPU takes them: each matrix's ladder, in a fixed number of steps."""

import pytest
import torch
from dispatched import Calls
from spectra import lapack, planted, power_law, rank_above, steps, true_error

from prolora import truncated_svd
from prolora.core.svd import krylov, stacks

SMALL, LARGE = 400, 800
# What makes the host wait for a number on a GPU.
WAITS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "tolist"}


def weight(d, n, values, seed=0):
    return planted(d, n, values, seed)[0].float()


def mixed_stack(m, n, k):
    """Healthy, zero and clustered matrices, those of low rank and without a gap, in no order."""
    d = min(m, n)
    spectra = [power_law(d, 0.5), torch.zeros(d), steps(d, k), rank_above(d, k)]
    if d < LARGE:
        spectra += [torch.linspace(2, 1, k // 2), power_law(d, 1.0), steps(d, k // 2)]
    return torch.stack([weight(m, n, values, seed) for seed, values in enumerate(spectra)])


@pytest.fixture
def whole_stacks(monkeypatch):
    """Switches the CPU to whole stacks."""
    return lambda: monkeypatch.setattr(stacks, "FORCE_BATCHED", True)


@pytest.mark.parametrize(
    ("d", "n", "rank"),
    [
        (LARGE, LARGE, 64),
        pytest.param(SMALL, 450, 100, marks=pytest.mark.slow),
        pytest.param(450, SMALL, 5, marks=pytest.mark.slow),
        (450, SMALL, 0.9),
        pytest.param(SMALL, 450, 0.99, marks=pytest.mark.slow),
        (40, 60, 16),
    ],
)
def test_a_whole_stack_equals_its_members_each_on_its_own_rung(whole_stacks, d, n, rank):
    stack = mixed_stack(d, n, rank if rank > 8 else min(d, n) // 4)
    alone = [truncated_svd(one, rank) for one in stack]
    whole_stacks()
    together = truncated_svd(stack, rank)
    assert together.rungs == tuple(one.rung for one in alone)
    assert len(set(together.rungs)) > (d != 40)
    assert together.rank.tolist() == [int(one.rank) for one in alone]
    assert together.ok.tolist() == [bool(one.ok) for one in alone]
    assert together.U.shape[-1] == max(1, int(together.rank.max()))
    for i, one in enumerate(alone):
        k = int(one.rank)
        torch.testing.assert_close(together.S[i, :k], one.S[:k], rtol=1e-5, atol=1e-5)
        assert not together.U[i, :, k:].any() and not together.S[i, k:].any()
        bound = float(together.bound[i])
        if d < LARGE or i == 0:
            assert bound >= 1 or true_error(lapack(stack[i]), together[i]) <= bound


@pytest.mark.parametrize(
    ("d", "n", "rank", "rung"),
    [
        (768, 800, 16, "krylov"),
        pytest.param(768, 2400, 16, "krylov", marks=pytest.mark.slow),
        pytest.param(400, 450, 60, "gram-f32", marks=pytest.mark.slow),
        (400, 450, 0.9, "gram-f32"),
        (60, 80, 0.9, "gram-f64"),
    ],
)
def test_a_stack_takes_as_many_steps_and_waits_as_one_matrix(
    whole_stacks, monkeypatch, d, n, rank, rung
):
    tolist, counts, lists = torch.Tensor.tolist, [], []

    def counted(tensor):  # does not pass the dispatcher
        lists.append(tensor.shape)
        return tolist(tensor)

    whole_stacks()
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    one = weight(d, n, power_law(d, 0.5))
    stack = torch.stack([one.roll(turn, 1) for turn in range(6)])
    truncated_svd(stack[:1], rank)  # random vectors are drawn once and kept
    for size in (2, 6):
        lists.clear()
        with Calls() as calls:
            basis = truncated_svd(stack[:size], rank)
        assert basis.rungs == (rung,) * size
        waits = sum(calls.counts[name] for name in WAITS) + len(lists)
        counts.append((calls.counts.total(), waits))
        assert (calls.counts["prolora::panel_qr"] > 3) == (rung == "krylov")  # through the kernel
    assert counts[0] == counts[1] and 0 < counts[0][1] <= 8
    again = truncated_svd(stack, rank)
    for name in ("U", "S", "V", "bound", "residual"):
        assert torch.equal(getattr(basis, name), getattr(again, name))


def test_a_gpu_s_stack_fills_a_share_of_its_memory_and_gives_way_by_halves():
    gib = 1 << 30
    assert stacks._gpu_budget(75 * gib, 80 * gib) == 8 * gib
    assert stacks._gpu_budget(20 * gib, 24 * gib) == 6 * gib
    assert stacks._gpu_budget(7 * gib, 8 * gib) == 2 * gib
    assert stacks._gpu_budget(5 * gib, 80 * gib) == 2 * gib
    assert stacks._gpu_budget(0, 80 * gib) <= 1


@pytest.mark.parametrize("capability, cost", [((9, 0), 2), ((8, 9), 40), ((12, 0), 40)])
def test_cards_with_slow_float64_form_a_gram_matrix_only_where_that_saves_float64(
    monkeypatch, capability, cost
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert stacks.float64_cost(torch.device("cuda")) == cost
    assert stacks.float64_cost(torch.device("cpu")) == 2
    wide, square = (1280, 10240), (1280, 1280)
    assert krylov._gram_pays(wide, 512, 128, cost) == (cost == 2)
    assert not krylov._gram_pays(square, 512, 128, cost)
