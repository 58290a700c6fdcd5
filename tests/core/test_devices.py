"""On a GPU the same results as on the CPU: `pytest -k cuda` selects what a card has to show.

Where there is no card, the CPU takes whole stacks as a GPU would. Judged by projectors and values,
never by singular vectors.
"""

import pytest
import torch
from backends import missing
from diagonal import keep_some
from dispatched import Calls
from spectra import (
    lapack,
    planted,
    power_law,
    rank_above,
    related,
    sine,
    steps,
    true_error,
    weights,
)

from prolora import principal_angles, project, similarity, truncated_svd
from prolora.core import basis
from prolora.core.svd import krylov, stacks


def require_card():
    if not torch.cuda.is_available():
        missing("cuda", "torch sees no GPU")


@pytest.fixture(params=["cuda", "whole stacks on the cpu"])
def device(request, monkeypatch):
    """Where to compute; what is computed on the CPU beside it is left as it always is."""
    if request.param == "cuda":
        require_card()
        return "cuda"
    monkeypatch.setattr(stacks, "FORCE_BATCHED", True)
    return "cpu"


def plain(call, *operands, **options):
    """What the CPU gives in its usual way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "FORCE_BATCHED", False)
        return call(*operands, **options)


def stack(count, m, n, exponent=0.5):
    return torch.stack([weights(m, n, seed, exponent) for seed in range(count)])


def check_equal_subspaces(found, wanted):
    """Equal ranks, values, and subspaces to within the two bounds."""
    found = found.to("cpu")
    assert torch.equal(found.rank, wanted.rank)
    torch.testing.assert_close(found.S, wanted.S, rtol=1e-5, atol=1e-5 * float(wanted.S.max()))
    for i, k in enumerate(wanted.rank.tolist()):
        allowed = float(found.bound[i] + wanted.bound[i]) + 2e-6
        for x, y in ((wanted.U[i], found.U[i]), (wanted.V[i], found.V[i])):
            assert sine(x[:, :k], y[:, :k]) <= allowed and not y[:, k:].any()
    assert torch.equal(found.ok, wanted.ok)


def mixed(m, n, k):
    """Healthy, zero and clustered matrices, those of low rank and without a gap, in no order."""
    d = min(m, n)
    spectra = [power_law(d, 0.5), torch.zeros(d), steps(d, k), rank_above(d, k)]
    if d < 768:
        spectra += [torch.linspace(2, 1, k // 2), power_law(d, 1.0), steps(d, k // 2)]
    return torch.stack([planted(m, n, x, seed)[0].float() for seed, x in enumerate(spectra)])


# The solvers of the ladder, and what leaves them.
CASES = {
    "krylov": (lambda: stack(2, 768, 800), 48),
    "gram-f32": (lambda: stack(2, 400, 384), 100),
    "energy 0.9": (lambda: stack(2, 384, 384), 0.9),
    "gram-f64": (lambda: stack(3, 48, 64), 12),
    "svd-f64": (lambda: stack(2, 64, 48, exponent=5.0), 24),
    "low rank": (lambda: stack(2, 48, 5) @ stack(2, 5, 64), 12),
    "float64": (lambda: stack(2, 48, 64).double(), 12),
    "mixed, krylov": (lambda: mixed(800, 800, 64), 64),
    "mixed, gram-f32": (lambda: mixed(400, 450, 100), 100),
    "mixed, few": (lambda: mixed(450, 400, 100), 5),
    "mixed, energy 0.9": (lambda: mixed(450, 400, 100), 0.9),
    "mixed, gram-f64": (lambda: mixed(40, 60, 16), 16),
}
SLOW = {"krylov", "gram-f32", "energy 0.9", "mixed, gram-f32", "mixed, few"}


@pytest.mark.parametrize("case", keep_some(CASES, *(CASES.keys() - SLOW)))
def test_subspaces_are_those_of_the_cpu_each_on_its_own_rung(device, case):
    make, rank = CASES[case]
    weight = make()
    found = truncated_svd(weight.to(device), rank)
    assert found.U.device.type == device
    wanted = plain(truncated_svd, weight, rank)
    check_equal_subspaces(found, wanted)
    if not case.startswith("mixed"):
        return
    for i, one in enumerate(weight if len(weight[0]) < 768 else weight[:1]):
        bound = float(found.bound[i])
        assert bound >= 1 or true_error(lapack(one), found.to("cpu")[i]) <= bound


@pytest.mark.parametrize("rank", [12, 0.9])
def test_a_stack_of_several_chunks_is_the_stack_of_its_members(device, rank, monkeypatch):
    weight = stack(5, 48, 64)
    whole = truncated_svd(weight.to(device), rank)
    monkeypatch.setattr(basis, "chunk_size", lambda *_: 2)
    check_equal_subspaces(truncated_svd(weight.to(device), rank), whole.to("cpu"))


def test_updates_are_projected_as_on_the_cpu(device):
    source = stack(3, 48, 64)
    update = torch.randn(3, 48, 64, generator=torch.Generator().manual_seed(1))
    operands = update, source, related(source, 0.2, seed=9)
    moved = project(*(x.to(device) for x in operands), rank=12)
    torch.testing.assert_close(
        moved.cpu(), plain(project, *operands, rank=12), rtol=1e-4, atol=1e-4
    )


def test_overlaps_and_angles_are_those_of_the_cpu(device):
    source = stack(3, 64, 48)
    target = related(source, 0.3, seed=9)
    wanted = plain(similarity, source, target, rank=8)
    found = similarity(source.to(device), target.to(device), rank=8)
    torch.testing.assert_close(found.left.cpu(), wanted.left, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.right.cpu(), wanted.right, rtol=0, atol=1e-5)
    x, y = source[..., :20], target[..., :12]
    angles = plain(principal_angles, x, y)
    torch.testing.assert_close(
        principal_angles(x.to(device), y.to(device)).cpu(), angles, rtol=1e-9, atol=1e-9
    )


def test_a_call_waits_for_what_its_own_stream_has_queued_on_cuda():
    """And for nothing else: the default stream would still see zeros."""
    require_card()
    weight = stack(4, 400, 384).pin_memory()
    wanted = plain(truncated_svd, weight, 40)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.zeros(weight.shape, device="cuda")
        torch.cuda._sleep(100_000_000)
        late.copy_(weight, non_blocking=True)
        found = truncated_svd(late, 40)
    side.synchronize()
    check_equal_subspaces(found, wanted)


def test_a_second_device_computes_where_its_tensors_are_on_cuda():
    require_card()
    if torch.cuda.device_count() < 2:
        pytest.skip("cuda: there is no second GPU")
    weight = stack(2, 400, 384)
    with torch.cuda.device(0):
        found = truncated_svd(weight.to("cuda:1"), 40)
        angles = principal_angles(weight[..., :9].to("cuda:1"), weight[..., 9:20].to("cuda:1"))
    assert found.U.device == angles.device == torch.device("cuda", 1)
    check_equal_subspaces(found, plain(truncated_svd, weight, 40))


# What makes the host wait for a number on a GPU.
WAITS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "tolist"}


@pytest.mark.parametrize(
    ("d", "n", "rank", "solver"),
    [
        (768, 800, 16, "krylov"),
        pytest.param(768, 2400, 16, "krylov", marks=pytest.mark.slow),
        pytest.param(400, 450, 60, "gram-f32", marks=pytest.mark.slow),
        (400, 450, 0.9, "gram-f32"),
        (60, 80, 0.9, "gram-f64"),
    ],
)
def test_a_stack_takes_as_many_steps_and_waits_as_one_matrix(monkeypatch, d, n, rank, solver):
    tolist, counts, lists = torch.Tensor.tolist, [], []

    def counted(tensor):  # does not pass the dispatcher
        lists.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(stacks, "FORCE_BATCHED", True)
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    one = weights(d, n, 0)
    stack = torch.stack([one.roll(turn, 1) for turn in range(6)])
    truncated_svd(stack[:1], rank)  # random vectors are drawn once and kept
    for size in (2, 6):
        lists.clear()
        with Calls() as calls:
            basis = truncated_svd(stack[:size], rank)
        assert basis.solvers == (solver,) * size
        waits = sum(calls.counts[name] for name in WAITS) + len(lists)
        counts.append((calls.counts.total(), waits))
        assert (calls.counts["prolora::panel_qr"] > 3) == (solver == "krylov")  # through the kernel
    assert counts[0] == counts[1] and 0 < counts[0][1] <= 8
    again = truncated_svd(stack, rank)
    for name in ("U", "S", "V", "bound", "residual"):
        assert torch.equal(getattr(basis, name), getattr(again, name))


def test_a_gpu_s_stack_fills_a_share_of_its_memory_and_gives_way_by_halves(monkeypatch):
    gib = 1 << 30
    assert stacks._gpu_budget(75 * gib, 80 * gib) == 8 * gib
    assert stacks._gpu_budget(20 * gib, 24 * gib) == 6 * gib
    assert stacks._gpu_budget(7 * gib, 8 * gib) == 2 * gib
    assert stacks._gpu_budget(5 * gib, 80 * gib) == 2 * gib
    assert stacks._gpu_budget(0, 80 * gib) <= 1
    monkeypatch.setattr(stacks, "_gpu_memory", lambda device: (20 * gib, 24 * gib))
    square, card = torch.Size([1280, 1280]), torch.device("cuda")
    assert stacks.chunk_size(square, card) == 6 * gib // (112 * 1280**2)
    assert stacks.chunk_size(square, card, few_columns=True) == 6 * gib // (36 * 1280**2)


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
