"""On a GPU the same results as on the CPU: `pytest -k cuda` selects what a card has to show.

Where there is no card, the CPU takes whole stacks as a GPU would. Judged by projectors and values,
never by singular vectors.
"""

import pytest
import torch
from backends import missing
from spectra import related, sine, weights

from prolora import principal_angles, project, similarity, truncated_svd
from prolora.core import basis
from prolora.core.svd import stacks


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
            assert sine(x[:, :k], y[:, :k]) <= allowed
    assert torch.equal(found.ok, wanted.ok)


# The rungs of the ladder, and what leaves them.
CASES = {
    "krylov": (lambda: stack(2, 768, 800), 48),
    "gram-f32": (lambda: stack(2, 400, 384), 100),
    "energy 0.9": (lambda: stack(2, 384, 384), 0.9),
    "gram-f64": (lambda: stack(3, 48, 64), 12),
    "svd-f64": (lambda: stack(2, 64, 48, exponent=5.0), 24),
    "low rank": (lambda: stack(2, 48, 5) @ stack(2, 5, 64), 12),
    "zero": (lambda: torch.zeros(2, 48, 64), 12),
    "float64": (lambda: stack(2, 48, 64).double(), 12),
    "no matrix": (lambda: torch.zeros(0, 48, 64), 12),
}


@pytest.mark.parametrize("case", CASES)
def test_subspaces_are_those_of_the_cpu(device, case):
    make, rank = CASES[case]
    weight = make()
    found = truncated_svd(weight.to(device), rank)
    assert found.U.device.type == device
    if len(weight):
        check_equal_subspaces(found, plain(truncated_svd, weight, rank))


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
    found = project(*(x.to(device) for x in operands), rank=12)
    torch.testing.assert_close(
        found.cpu(), plain(project, *operands, rank=12), rtol=1e-4, atol=1e-4
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
