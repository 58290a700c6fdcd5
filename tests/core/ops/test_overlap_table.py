"""overlap_table: every backend against sums of (UsᵀUt)² in float64, for all leading columns."""

import pytest
import reference
import torch
from backends import Kernels, load
from spectra import orthonormal

from prolora import errors
from prolora.core.ops import torch_twin
from prolora.core.ops.overlap_table import group_sizes, overlap_table
from prolora.core.overlap_tables import overlap_tables

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
    generator = torch.Generator().manual_seed(seed)
    us = [torch.randn(b, m, k, dtype=dtype, generator=generator) for b, m, k, _ in shapes]
    ut = [torch.randn(b, m, k, dtype=dtype, generator=generator) for b, m, _, k in shapes]
    return us, ut


def assert_tables(us, ut, table, shells, eps):
    """`eps`: of the products."""
    for s, t in zip(us, ut, strict=True):
        blocks, _, count = group_sizes(s, t)
        mine, table = table[:blocks], table[blocks:]
        curve, shells = shells[:count].reshape(len(s), -1 if count else 0), shells[count:]
        if not blocks:
            continue
        mine = mine.reshape(len(s), -(-s.shape[2] // 64), -(-t.shape[2] // 64))
        square = (s.double().mT @ t.double()).square()
        scale = (s.double().norm(dim=(1, 2)) * t.double().norm(dim=(1, 2))).square()
        tolerance = ((s.shape[1] + 8) * eps * scale).max()
        for i in range(mine.shape[1]):
            for j in range(mine.shape[2]):
                exact = square[:, 64 * i : 64 * i + 64, 64 * j : 64 * j + 64].sum((1, 2))
                assert ((mine[:, i, j] - exact).abs() <= tolerance).all()
        for k in range(curve.shape[1]):
            exact = square[:, : k + 1, : k + 1].sum((1, 2))
            assert ((curve[:, : k + 1].sum(1) - exact).abs() <= tolerance).all()
    assert not len(table) and not len(shells)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_all_shapes_in_one_call(kernels, dtype):
    us, ut = problem(SHAPES, dtype)
    assert_tables(us, ut, *kernels.overlap_table(us, ut), torch.finfo(dtype).eps)


@pytest.mark.parametrize("at_a_time", [1, 20_000, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_twin_gives_the_same_whatever_goes_at_a_time(dtype, at_a_time, monkeypatch):
    monkeypatch.setattr(torch_twin, "PRODUCT", at_a_time)
    us, ut = problem(SHAPES, dtype)
    table, shells = torch_twin.overlap_table(us, ut)
    assert table.dtype == shells.dtype == torch.float64
    assert_tables(us, ut, table, shells, torch.finfo(dtype).eps)


def test_results_repeat_bit_by_bit(kernels):
    us, ut = problem([(3, 100, 70, 80), (1, 64, 64, 64)], torch.float32)
    for first, again in zip(
        kernels.overlap_table(us, ut), kernels.overlap_table(us, ut), strict=True
    ):
        assert torch.equal(first, again)


@pytest.mark.parametrize("kind", ["dense", "coordinates", "two levels", "equal magnitudes"])
def test_phi_is_exact_to_2e_6_whatever_the_columns_look_like(kind):
    """Columns whose entries all round the same way would show a bias of the arithmetic."""
    source, target = columns_of(kind, 512, 96)
    exact = reference.subspace_overlap(source.double(), target.double())
    (table,) = overlap_tables([source], [target])
    assert abs(float(table.at(96) - exact / 96)) < 2e-6


@pytest.mark.parametrize("kind", ["two levels", "equal magnitudes"])
@pytest.mark.parametrize("capability", ["75", "90"])
def test_tensor_cores_keep_float32s_accuracy(kind, capability, monkeypatch):
    """One TF32 product of these columns would be off by 3e-4."""
    monkeypatch.setenv("EMU_CAPABILITY", capability)
    emulated = Kernels(load("emulated", "_emulated"), cuda=True)
    source, target = columns_of(kind, 128, 5)
    exact = reference.subspace_overlap(source.double(), target.double())
    table, _ = emulated.overlap_table([source[None]], [target[None]])
    assert abs(float(table - exact) / 5) < 1e-6


def columns_of(kind, m, k):
    """Orthonormal columns [m, k], float32, and a rotation of them."""
    generator = torch.Generator().manual_seed(0)
    signs = sign_matrix(m)[:, :k]
    if kind == "dense":
        u = orthonormal(m, k, generator)
    elif kind == "coordinates":
        u = torch.eye(m)[:, 7 : 7 + k]
    elif kind == "two levels":
        levels = torch.where(torch.arange(m) % 2 == 0, 0.9, 1.1).double()
        u = torch.linalg.qr(signs * levels[:, None])[0]
    else:
        u = signs / m**0.5
    t = torch.linalg.qr(u.double() + 0.01 * torch.randn(m, k, generator=generator).double())[0]
    return u.float(), t.float()


def sign_matrix(m):
    """An orthogonal matrix [m, m] of ±1, up to √m (Sylvester)."""
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < m:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)], 0)
    return signs


def test_one_table_answers_for_every_number_of_columns():
    us = torch.linalg.qr(torch.randn(2, 150, 100, dtype=torch.float64))[0]
    ut = torch.linalg.qr(torch.randn(2, 150, 130, dtype=torch.float64))[0]
    (table,) = overlap_tables([us], [ut])
    curve = torch.stack([reference.overlap_curve(a, b) for a, b in zip(us, ut, strict=True)])
    torch.testing.assert_close(table.shells.cumsum(-1), curve)
    torch.testing.assert_close(
        table.curve()[:, 36], reference.subspace_overlap(us[..., :37], ut[..., :37]) / 37
    )
    torch.testing.assert_close(table.at(37), table.curve()[:, 36])
    for a, b in ((64, 128), (100, 130), (100, 64), (0, 64)):
        exact = reference.subspace_overlap(us[..., :a], ut[..., :b])
        torch.testing.assert_close(table.shared(a, b), exact, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="steps of 64 and at 100 and 130, not 37 and 64"):
        table.at(37, 64)
    with pytest.raises(ValueError, match="100 and 130 columns, not 101 and 101"):
        table.at(101)


def test_single_matrices_and_stacks_mix():
    us, ut = problem([(1, 30, 7, 9), (3, 20, 70, 5)], torch.float64)
    tables = overlap_tables([us[0][0], us[1]], [ut[0][0], ut[1]])
    assert tables[0].shells.shape == (7,) and tables[1].blocks.shape == (3, 2, 1)
    assert overlap_table([], []) == []


def test_groups_must_agree():
    with pytest.raises(errors.ShapeMismatch, match=r"\(5, 3\).*\(4, 3\)"):
        overlap_table([torch.zeros(5, 3)], [torch.zeros(4, 3)])
    two = [torch.zeros(5, 3), torch.zeros(5, 3).double()]
    with pytest.raises(TypeError, match="one dtype and device"):
        overlap_table(two, two)
    with pytest.raises(TypeError, match="float16"):
        overlap_table([two[0].half()], [two[0].half()])
