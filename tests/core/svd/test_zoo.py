"""The spectrum zoo: on any weight the bound is never below the error, and `ok` is never wrong.

Judged by the planted subspace and by LAPACK's ratios, never by comparing singular vectors.
"""

import math
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import load
from safetensors.torch import load_file
from spectra import clusters, lapack, planted, power_law, spiked, true_error

from prolora import truncated_svd
from prolora.core.ops import native, precise_product
from prolora.core.reference import columns_for_energy
from prolora.core.svd import stacks

EPS32 = torch.finfo(torch.float32).eps
MINI = Path(__file__).parents[3] / "examples" / "mini_family" / "weights"


def outlier(d, times=300.0):
    """A power law, of which the first value is far above the others."""
    values = power_law(d, 0.5)
    values[0] *= times
    return values


# Name: (m, n, singular values, columns). d = 400 is the solver gram-f32, d = 800 the solver krylov.
SMALL, LARGE = 400, 800
ZOO = {
    "i^-0.5": (SMALL, SMALL, power_law(SMALL, 0.5), 150),
    "i^-0.5, wide": (SMALL, 900, power_law(SMALL, 0.5), 200),
    "i^-0.5, tall": (900, SMALL, power_law(SMALL, 0.5), 100),
    "i^-1": (SMALL, SMALL, power_law(SMALL, 1.0), 60),
    "i^-2, beyond a float32 Gram matrix": (SMALL, SMALL, power_law(SMALL, 2.0), 150),
    "k inside the bulk": (SMALL, 500, spiked(SMALL, 500, 20), 80),
    "steps, cut at one": (SMALL, SMALL, torch.tensor([4.0] * 100 + [1.0] * 300), 100),
    "clusters, cut between two": (SMALL, SMALL, clusters(SMALL, 50, 1e-3), 100),
    "clusters, cut inside one": (SMALL, SMALL, clusters(SMALL, 50, 1e-6), 120),
    "repeated value at the cut": (SMALL, SMALL, torch.tensor([2.0] * 50 + [1.0] * 350), 100),
    "rank below k": (SMALL, 500, torch.linspace(2, 1, 60), 100),
    "rank one": (SMALL, SMALL, torch.ones(1), 5),
    "rank k": (SMALL, SMALL, power_law(150, 0.5), 150),
    "clusters, cut late inside one": (640, 640, clusters(640, 50, 1e-3), 487),
    "all columns but one": (SMALL, SMALL, power_law(SMALL, 0.5), SMALL - 1),
    "nearly all, i^-0.6": (SMALL, 500, power_law(SMALL, 0.6), 330),
    "nearly all, rank a little above k": (SMALL, SMALL, power_law(380, 0.5), 370),
    "all columns": (SMALL, 500, power_law(SMALL, 0.7), SMALL),
    "all columns, and fewer than that": (SMALL, SMALL, power_law(300, 0.5), SMALL),
    "one value far above": (SMALL, SMALL, outlier(SMALL), 150),
    "one value far above, nearly all": (SMALL, SMALL, outlier(SMALL), 350),
    "large, one value far above": (LARGE, LARGE, outlier(LARGE), 80),
    "large, flat": (LARGE, LARGE, torch.linspace(1, 0.5, LARGE), 80),
    "large, i^-2": (LARGE, LARGE, power_law(LARGE, 2.0), 100),
    "tiny": (SMALL, SMALL, 1e-30 * power_law(SMALL, 0.5), 150),
    "huge": (SMALL, SMALL, 1e30 * power_law(SMALL, 0.5), 150),
    "large, i^-0.5": (LARGE, LARGE, power_law(LARGE, 0.5), 80),
    "large, i^-1": (LARGE, 1000, power_law(LARGE, 1.0), 40),
    "large, k inside the bulk": (LARGE, LARGE, spiked(LARGE, LARGE, 20), 60),
    "large, more equal values than a block has columns": (
        LARGE,
        LARGE,
        torch.cat([torch.full((60,), 2.0), power_law(LARGE - 60, 0.5)]),
        60,
    ),
    "large, equal values hidden above the cut": (
        LARGE,
        LARGE,
        torch.cat([torch.full((60,), 2.0), power_law(LARGE - 60, 0.5)]),
        90,
    ),
    "large, rank below k": (LARGE, LARGE, torch.linspace(2, 1, 30), 64),
    "large, rank a little above k": (LARGE, LARGE, torch.linspace(2, 1, 90), 64),
}
ZOO |= {
    "small, 0.5^i": (48, 80, 0.5 ** torch.arange(48.0), 8),
    "small, graded beyond float32": (80, 48, 10.0 ** -torch.arange(0, 12, 0.25), 8),
    "small, clusters": (48, 48, clusters(48, 8, 1e-3), 8),
    "small, tall, steps": (80, 48, torch.tensor([4.0] * 8 + [1.0] * 40), 8),
    "large and tall, k inside the bulk": (1000, LARGE, spiked(LARGE, LARGE, 40), 40),
}
# Without the extension LAPACK solves what the solver tridiagonal does.
OWN_SOLVER = "tridiagonal" if native.EXTENSION.kernels else "gram-f64"
NO_GAP = {"repeated value at the cut"}
# Float32 is enough where the gap at the cut is clear.
SOLVERS = dict.fromkeys(("i^-0.5", "rank k"), OWN_SOLVER)
SOLVERS |= dict.fromkeys((x for x in ZOO if x.startswith("small,")), OWN_SOLVER)
SOLVERS |= {"i^-2, beyond a float32 Gram matrix": "gram-f64", "large, i^-0.5": "krylov"}


@pytest.fixture
def way(request, monkeypatch):
    """As a CPU goes, or as a GPU does where its float64 products come from the kernel's text."""
    if request.param == "gpu":
        extension = load("cpu", "_C")
        by_kernel = partial(precise_product.run_precise_product, extension, cuda=False)
        op = replace(native.OPS["precise_product"], twin=by_kernel)
        monkeypatch.setitem(native.OPS, "precise_product", op)
        monkeypatch.setattr(stacks, "FORCE_BATCHED", True)


@lru_cache(1)
def weight_of(name):
    """A weight and its subspaces as stored: rounding to float32 moves those that were planted."""
    m, n, values, _ = ZOO[name]
    weight = planted(m, n, values)[0].float()
    return weight, lapack(weight)


# By the kernel's text a weight takes a second: for every change some that stay on their solver, and
# some that leave it.
QUICK = {"i^-0.5, tall", "i^-1", "k inside the bulk", "clusters, cut inside one", "rank k", "tiny"}
QUICK |= {"large, i^-0.5", "all columns", "small, 0.5^i"}
WAYS = [
    pytest.param(name, way, marks=pytest.mark.slow if way == "gpu" and name not in QUICK else ())
    for name in ZOO
    for way in ("cpu", "gpu")
]


@pytest.mark.parametrize(("name", "way"), WAYS, indirect=["way"])
def test_the_bound_holds_and_ok_means_a_projector_good_to_a_thousandth(name, way):
    """The error of a projector is the sine to the true subspace."""
    m, n, values, k = ZOO[name]
    weight, exact = weight_of(name)
    basis = truncated_svd(weight, k)
    if name in NO_GAP:
        assert not basis.ok and basis.bound == 1
        return
    assert stacks.FORCE_BATCHED or basis.solver == SOLVERS.get(name, basis.solver)
    assert int(basis.rank) == k and true_error(exact, basis) <= basis.bound
    assert basis.ok == (basis.bound <= 1e-3)
    # LAPACK's ratios, for results kept in float32.
    big = max(m, n) * EPS32
    used = int(basis.rank)
    s = basis.S[:used].double()
    left, right = basis.U[:, :used].double(), basis.V[:, :used].double()
    identity = torch.eye(used, dtype=torch.float64)
    norm = float(values.double().norm())
    assert float((left.mT @ left - identity).norm()) < 2 * big
    assert float((right.mT @ right - identity).norm()) < 2 * big
    missed = float((weight.double() @ right - left * s).norm()) / norm
    assert missed < big
    # What is stated may be an estimate from a few random rows, doubled.
    assert missed <= max(2 * float(basis.residual), 10 * EPS32)
    assert float(basis.residual) < max(4 * missed, big)
    assert (basis.S.diff() <= 0).all() and (basis.S >= 0).all()


@pytest.mark.parametrize("kind", ["outlier channels", "rows of very different size"])
def test_channels_far_larger_than_the_rest_do_not_blind_the_fast_rung(kind):
    """What makes the weights of diffusion models harder than random ones."""
    weight = planted(SMALL, SMALL, power_law(SMALL, 0.5))[0]
    if kind == "outlier channels":
        weight[:, ::97] *= 50
    else:
        weight *= torch.logspace(0, -3, SMALL, dtype=torch.float64)[:, None]
    weight = weight.half()
    basis = truncated_svd(weight, 120)
    assert basis.ok and true_error(lapack(weight), basis) <= basis.bound


@pytest.mark.parametrize("rank", [0.9, 0.9995])
def test_energy_counts_the_same_columns_in_float32_as_in_float64(rank):
    """Also if all of them are needed."""
    for seed in range(2):
        weight = planted(SMALL, SMALL, torch.linspace(2, 1, SMALL), seed)[0].float()
        single, double = truncated_svd(weight, rank), truncated_svd(weight.double(), rank)
        assert single.solver == OWN_SOLVER and double.solver == "gram-f64" and single.ok
        assert int(single.rank) == int(double.rank) == columns_for_energy(weight, rank)
        assert float(single.energy) == pytest.approx(float(double.energy), abs=1e-6)


def test_the_bound_holds_on_every_trained_weight_of_the_mini_family():
    state = load_file(MINI / "source" / "diffusion_pytorch_model.safetensors")
    matrices = {name: w.flatten(1) for name, w in state.items() if w.ndim in (2, 4)}
    assert len(matrices) > 50
    for i, (name, weight) in enumerate(matrices.items()):
        basis = truncated_svd(weight, 0.9 if i % 2 else max(1, min(weight.shape) // 4))
        assert true_error(lapack(weight), basis) <= basis.bound, name


def with_one_large_number(gap, small):
    """Two orthogonal rows of one large and many small numbers, of nearly equal lengths."""
    generator = torch.Generator().manual_seed(0)
    w = 1e-9 * torch.randn(384, 1280, generator=generator)
    w[:2] = small * (torch.rand(1280, generator=generator) + 0.5)
    w[:2, :2] = 0
    w[0, 0], w[1, 1] = 0.51, 0.51 * (1 + gap / 2)
    for _ in range(3):
        w[1, 0] -= float(w[0].double() @ w[1].double()) / 0.51
    squares = w[:2].double().square().sum(1)
    w[1, 1] = float((w[1, 1].double() ** 2 + squares[0] - squares[1] + gap * 0.26).sqrt())
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", ["large", "equal"])
def test_digits_report_all_that_they_lose(size, dtype):
    """Against sums in long double: of rows of one large number, and of equal numbers."""
    extension = load("cpu", "_C")
    x = with_one_large_number(1e-7, 3e-3)[:4].to(dtype)
    if size == "equal":  # whose dropped products all have one sign
        x[:2] = 0x305050505050 * 2.0**-54
        x[0, 0], x[1, 1] = 0.51, 0.5
    found, error = precise_product.run_precise_product(extension, x[None], None, False)
    exact = np.asarray(x.double(), dtype=np.longdouble)
    missed = np.asarray(found[0], dtype=np.longdouble) - exact @ exact.T
    assert 0 < float(np.linalg.norm(missed.astype(float))) <= float(error) < 1e-9


@pytest.mark.parametrize(("gap", "small"), [(1e-8, 3e-3), (1e-7, 1e-3)])
@pytest.mark.parametrize("way", ["gpu"], indirect=True)
def test_the_bound_holds_where_digits_lose_most_and_what_they_report_counts(way, gap, small):
    w = with_one_large_number(gap, small)
    exact = np.asarray(w[:2].double(), dtype=np.longdouble)
    (a, b), (_, c) = exact @ exact.T
    turn = 0.5 * math.atan2(2 * float(b), float(a - c))
    u = torch.zeros(384, dtype=torch.float64)
    u[0], u[1] = math.cos(turn), math.sin(turn)
    basis = truncated_svd(w[None], 1)
    x = basis.U[0, :, 0].double()
    assert float(torch.linalg.vector_norm(x - u * (u @ x))) <= float(basis.bound) + 1e-6
    _, reported = precise_product.measured_product(w[None])
    assert reported > 1e-3 * gap * 0.26 and basis.solvers == ("gram-f64",)  # which has no digits
