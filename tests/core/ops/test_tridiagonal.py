"""Leading eigenpairs in three steps against LAPACK in float64."""

import math

import pytest
import torch
from backends import GuardedMemory, load
from spectra import randn

from prolora.core.ops import native, tridiagonal
from prolora.core.ops.tridiagonal import (
    tridiagonal_values,
    tridiagonal_vectors,
    tridiagonalise,
)

# Around the widths of a panel (32), of rows and columns taken at once (4, 8, 16), and of vectors.
SIZES = [1, 2, 3, 5, 8, 17, 31, 32, 33, 34, 63, 64, 66, 100, 131]


if native.EXTENSION.kernels is None:
    pytest.skip(f"no compiled extension: {native.EXTENSION.why}", allow_module_level=True)


def symmetric(b, d, dtype=torch.float64, seed=0):
    a = randn(b, d, d, seed=seed)
    return (a + a.mT).to(dtype)


def written_out(diagonal, beside):
    t = torch.diag_embed(diagonal)
    t += torch.diag_embed(beside[:, :-1], 1) + torch.diag_embed(beside[:, :-1], -1)
    return t


def product_of_reflections(reflections, scales):
    """Q of one matrix, reflection by reflection."""
    d = len(scales)
    q = torch.eye(d, dtype=torch.float64)
    for j in range(d - 1):
        v = torch.zeros(d, dtype=torch.float64)
        v[j + 1], v[j + 2 :] = 1, reflections[j, j + 2 :].double()
        q -= float(scales[j]) * (q @ v)[:, None] * v
    return q


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reflections_turn_the_matrix_into_the_tridiagonal_one(dtype, d):
    a = symmetric(2, d, dtype)
    reflections, scales, diagonal, beside = tridiagonalise(a)
    assert (beside[:, -1] == 0).all()
    for i in range(2):
        q = product_of_reflections(reflections[i], scales[i])
        turned = q @ written_out(diagonal, beside)[i] @ q.mT
        allowed = 20 * torch.finfo(dtype).eps * float(a[i].norm())
        assert float((turned - a[i].double()).norm()) <= allowed


def test_the_lower_triangle_is_not_read():
    a = symmetric(1, 40)
    wrong = torch.where(torch.ones(40, 40).triu() > 0, a, torch.nan)
    for one, other in zip(tridiagonalise(a)[1:], tridiagonalise(wrong)[1:], strict=True):
        assert torch.equal(one, other)


# Of each kind of tridiagonal matrix its diagonal and the entries beside it.
KINDS = {
    "random": lambda d: (randn(d), randn(d, seed=1)),
    "zero": lambda d: (torch.zeros(d), torch.zeros(d)),
    "identity": lambda d: (torch.ones(d), torch.zeros(d)),
    "diagonal": lambda d: (randn(d), torch.zeros(d)),
    "negative": lambda d: (-10 - randn(d).abs(), randn(d)),
    "graded": lambda d: (torch.logspace(0, -12, d), torch.logspace(-1, -13, d)),
    "Wilkinson's": lambda d: ((torch.arange(d) - d // 2).abs(), torch.ones(d)),
    "Laplace's": lambda d: (torch.full((d,), 2), torch.full((d,), -1)),
    "huge": lambda d: (1e30 * randn(d), 1e30 * randn(d, seed=1)),
    "tiny": lambda d: (1e-30 * randn(d), 1e-30 * randn(d, seed=1)),
    "split": lambda d: (randn(d), randn(d, seed=1) * (torch.arange(d) % 5 > 0)),
}


def ends(kind, d):
    diagonal, beside = (x.double().clone()[None] for x in KINDS[kind](d))
    beside[:, -1] = 0
    return diagonal, beside


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 21, 90])
def test_values_are_those_of_lapack(kind, d):
    diagonal, beside = ends(kind, d)
    exact = torch.linalg.eigvalsh(written_out(diagonal, beside)).flip(1)
    for count in {1, min(d, 17), d}:
        found = tridiagonal_values(diagonal, beside, count)
        assert found.shape == (1, count)
        missed = torch.linalg.vector_norm(found - exact[:, :count], torch.inf)
        assert float(missed) <= 1e-13 * float(exact.abs().max())


@pytest.mark.parametrize("kind", ["random", "graded", "Laplace's", "huge", "tiny", "negative"])
def test_vectors_are_orthonormal_and_belong_to_their_values(kind):
    diagonal, beside = ends(kind, 70)
    t = written_out(diagonal, beside)
    values = torch.linalg.eigvalsh(t).flip(1)[:, :19].contiguous()
    x = tridiagonal_vectors(diagonal, beside, values).double()
    assert float((x @ x.mT - torch.eye(19).double()).abs().max()) < 1e-6
    assert float((x @ t - values[..., None] * x).abs().max()) < 1e-6 * float(values.abs().max())
    assert x[x != 0].abs().min() >= 1e-20  # smaller entries are zero, and none is subnormal


def test_nothing_is_written_beyond_its_place():
    a = symmetric(2, 45, torch.float32)
    with GuardedMemory() as memory:
        _, _, diagonal, beside = tridiagonalise(a)
        values = tridiagonal_values(diagonal, beside, 21)
        vectors = tridiagonal_vectors(diagonal, beside, values)
        memory.check()
    exact = torch.linalg.eigvalsh(a.double()).flip(1)[:, :21]
    torch.testing.assert_close(values, exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(21).double().expand(2, -1, -1))


def test_the_largest_size_is_the_extensions_own():
    assert load("cpu", "_C").max_tridiagonal == tridiagonal.MAX_COLUMNS


def test_an_entry_at_a_midpoint_of_the_bisection_loses_no_sign_change():
    """The first minor of T - s is then exactly 0."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(300):
        diagonal = torch.rand(1, 6, dtype=torch.float64, generator=generator) - 0.5
        beside = torch.rand(1, 6, dtype=torch.float64, generator=generator) - 0.5
        diagonal[0, 5], beside[0, 5] = 3, 0
        reach = 3 + float(beside[0, 4].abs())  # of Gershgorin's last disc, the largest
        unit = 2.0 ** -math.floor(math.log2(reach))
        low, high = -1.0000001 * unit * reach, 1.0000003 * unit * reach
        for _ in range(int(torch.randint(1, 12, (), generator=generator))):
            middle = 0.5 * (low + high)
            up = middle < 0.2 and bool(torch.rand((), generator=generator) < 0.6)
            low, high = (middle, high) if up or middle < -0.2 else (low, middle)
        diagonal[0, 0] = middle / unit
        exact = torch.linalg.eigvalsh(written_out(diagonal, beside)).flip(1)
        found = tridiagonal_values(diagonal, beside, 6)
        worst = max(worst, float((found - exact).abs().max()))
    assert worst <= 1e-13 * 3
