"""The sentence on the card: which own ops its calls run on a GPU, which the CPU plays here.

"Custom CUDA kernels for batched truncated SVD, subspace angles and fused projection."
"""

import pytest
import torch
from spectra import orthonormal, power_law
from torch.utils._python_dispatch import TorchDispatchMode

import prolora
from prolora.core.svd import krylov, stacks

D, K, R = 768, 96, 8
KRYLOV, PROJECTED = {"krylov_block", "panel_qr"}, {"precise_product", "project_pair"}


class OwnOps(TorchDispatchMode):
    """The names of prolora's ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = function.name().partition("::")
        if space == "prolora":
            self.names.add(name)
        return function(*args, **kwargs or {})


@pytest.fixture(scope="module")
def operands():
    generator = torch.Generator().manual_seed(0)
    u, v = orthonormal(D, D, generator), orthonormal(D, D, generator)
    w = ((u * power_law(D, 0.5)) @ v.mT)[None]
    moved = w + 1e-3 * torch.randn(1, D, D, generator=generator)
    up, down = torch.randn(1, D, R, generator=generator), torch.randn(1, R, D, generator=generator)
    return {"w": w, "moved": moved, "thin": prolora.LowRank(up, down), "dense": up @ down}


def truncated(rank):
    return lambda x: prolora.truncated_svd(x["w"], rank)


def angles(columns):
    return lambda x: prolora.principal_angles(x["w"][..., :columns], x["moved"][..., :columns])


def project(delta, rank):
    return lambda x: prolora.project(x[delta], x["w"], x["moved"], rank=rank)


# What a call runs; krylov_block where weights are stored in 16 bits and it wins its trial.
CALLS = {
    "truncated_svd, k = d/8": (truncated(K), {*KRYLOV, "precise_product"}),
    "truncated_svd, energy 0.99": (truncated(0.99), {"precise_product"}),
    "principal_angles, 128 columns": (angles(128), {"small_singular_values"}),
    "principal_angles, 192 columns": (angles(192), set()),
    "project, thin, k = d/8": (project("thin", K), {*KRYLOV, *PROJECTED}),
    "project, dense, k = d/8": (project("dense", K), {*KRYLOV, *PROJECTED}),
    "project, thin, by default": (project("thin", 0.99), PROJECTED),
    "project, dense, by default": (project("dense", 0.99), PROJECTED),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_cards_calls_run_these_own_ops(call, dtype, operands, monkeypatch):
    monkeypatch.setattr(stacks, "FORCE_BATCHED", True)
    monkeypatch.setattr(krylov, "_takes_stored", lambda *given: given[-1] is not None)
    run, expected = CALLS[call]
    given = {name: x if name == "thin" else x.to(dtype) for name, x in operands.items()}
    if dtype == torch.float32:
        monkeypatch.setattr(krylov, "_takes_stored", lambda *_: False)
        expected = expected - {"krylov_block"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other threads are not seen
    try:
        with OwnOps() as ops:
            run(given)
    finally:
        torch.set_num_threads(threads)
    assert ops.names == expected
