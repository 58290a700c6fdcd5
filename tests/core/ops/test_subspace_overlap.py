"""subspace_overlap: every backend against ‖UsᵀUt‖_F² in float64."""

from functools import reduce

import pytest
import torch
from backends import Kernels, load
from spectra import randn

from prolora.core import reference
from prolora.core.ops import subspace_overlap as module
from prolora.core.ops.subspace_overlap import subspace_overlap

DTYPES = [torch.float32, torch.float64]
# (b, m, ks, kt) of the groups of one call: ragged, wide, tall, single, empty each way.
SHAPES = [
    (2, 40, 9, 5),
    (1, 1, 1, 1),
    (2, 90, 130, 70),
    (1, 50, 68, 129),  # 16 bytes at a time on one side
    (1, 1300, 33, 64),
    (0, 4, 2, 3),
    (2, 0, 2, 3),
    (2, 4, 0, 3),
    (2, 4, 2, 0),
]


def problem(shapes, dtype, seed=0):
    us = [randn(b, m, k, dtype=dtype, seed=seed) for b, m, k, _ in shapes]
    return us, [randn(b, m, k, dtype=dtype, seed=seed + 1) for b, m, _, k in shapes]


def assert_overlaps(us, ut, found, eps):
    """`eps`: of the products."""
    parts = found.split([len(x) for x in us])
    for s, t, mine in zip(us, ut, parts, strict=True):
        exact = (s.double().mT @ t.double()).square().sum((1, 2))
        scale = (s.double().norm(dim=(1, 2)) * t.double().norm(dim=(1, 2))).square()
        assert mine.dtype == torch.float64
        assert ((mine - exact).abs() <= (s.shape[1] + 8) * eps * scale).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_all_shapes_in_one_call(kernels, dtype):
    us, ut = problem(SHAPES, dtype)
    assert_overlaps(us, ut, kernels.subspace_overlap(us, ut), torch.finfo(dtype).eps)


@pytest.mark.parametrize("at_a_time", [1, 20_000])
def test_the_twin_gives_the_same_whatever_goes_at_a_time(at_a_time, monkeypatch):
    monkeypatch.setattr(module, "PRODUCT", at_a_time)
    us, ut = problem(SHAPES, torch.float32)
    assert_overlaps(us, ut, module.sum_overlaps(us, ut), torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("kind", ["two levels", "equal magnitudes"])
@pytest.mark.parametrize("capability", ["75", "90"])
def test_tensor_cores_keep_float32s_accuracy(kind, capability, monkeypatch):
    """One TF32 product of these columns would be off by 3e-4."""
    monkeypatch.setenv("EMU_CAPABILITY", capability)
    emulated = Kernels(load("emulated", "_emulated"), cuda=True)
    source, target = columns_of(kind, 128, 5)
    exact = reference.subspace_overlap(source.double(), target.double())
    found = emulated.subspace_overlap([source[None]], [target[None]])
    assert abs(float(found - exact) / 5) < 1e-6


def columns_of(kind, m, k):
    """Orthonormal columns [m, k], float32, and a rotation of them; m is a power of two."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    signs = reduce(torch.kron, [pair] * (m.bit_length() - 1))[:, :k]  # orthogonal (Sylvester)
    if kind == "two levels":
        signs = signs * torch.where(torch.arange(m) % 2 == 0, 0.9, 1.1)[:, None]
    u = torch.linalg.qr(signs)[0]
    return u.float(), torch.linalg.qr(u + 0.01 * randn(m, k))[0].float()


def test_single_matrices_and_stacks_mix():
    us, ut = problem([(1, 30, 7, 9), (3, 20, 70, 5)], torch.float64)
    one, three = subspace_overlap([us[0][0], us[1]], [ut[0][0], ut[1]])
    assert one.shape == () and three.shape == (3,) and subspace_overlap([], []) == []
