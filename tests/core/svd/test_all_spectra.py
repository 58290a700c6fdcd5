"""truncated_svd on a grid of spectra, ranks, dtypes and shapes, compared with LAPACK in float64.

For every case the call returns, the number of columns is the right one, and the true sine of the
largest principal angle is at most the reported bound. `.ci/nightly slow` takes the whole grid, up
to 3072 x 3072, and prints a table of the solvers that were reached:

    OMP_NUM_THREADS=1 pytest -s -m "slow or not slow" tests/core/svd/test_all_spectra.py
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import pytest
import torch
from diagonal import keep_some
from spectra import clusters, lapack, planted, power_law, randn, sine, weights
from torch import Tensor

import prolora
from prolora import LowRank, project, similarity, truncated_svd
from prolora.core.reference import project_dense
from prolora.errors import ShapeMismatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# (m, n) as multiples of the short side.
SHAPES = {"square": (1, 1), "wide": (1, 1.25), "tall": (1.25, 1)}
# Columns as a share of the short side (1 is all of them), and shares of the energy.
FIXED_RANKS = (0.01, 0.1, 0.5, 0.75, 0.999, 1)
ENERGY_RANKS = (0.5, 0.9, 0.99, 0.9999)


def stairs(d: int) -> Tensor:
    """Eight levels, each half as high as the one before."""
    return 0.5 ** (torch.arange(d) * 8 // d).double()


SPECTRA = {
    **{f"i^-{p}": lambda d, p=p: power_law(d, p) for p in (0.3, 0.5, 0.7, 1, 1.25, 1.5, 2, 2.5)},
    **{f"i^-{p}": lambda d, p=p: power_law(d, p) for p in (3, 3.5, 4)},
    ".9^i": lambda d: 0.9 ** torch.arange(d).double(),
    ".97^i": lambda d: 0.97 ** torch.arange(d).double(),
    "exp(-i/20)": lambda d: torch.exp(-torch.arange(d).double() / 20),
    "a third of full rank": lambda d: power_law(max(1, d // 3), 0.5),
    "one outlier": lambda d: torch.cat([torch.tensor([1e4]).double(), power_law(d - 1, 0.5)]),
    "64 values from 1 to .01": lambda d: torch.linspace(1, 0.01, min(64, d)).double(),
    "clusters": lambda d: clusters(d, max(2, d // 8), 1e-3),
    "stairs": stairs,
}


def list_ranks(d: int) -> list[int | float]:
    """The fixed and energy ranks of the grid for a short side d."""
    return [*sorted({max(1, round(share * d)) for share in FIXED_RANKS}), *ENERGY_RANKS]


def expected_columns(s: Tensor, rank: int | float) -> tuple[int, int]:
    """Returns the fewest and most columns that are right for singular values s.

    They differ only if a sum of squares equals the wanted energy up to rounding.
    """
    if isinstance(rank, int):
        return rank, rank
    sums = s.square().cumsum(0)
    fewest, most = (int((sums < rank * sums[-1] * (1 + x)).sum()) + 1 for x in (-1e-7, 1e-7))
    return fewest, most


class Table:
    """Counts of solvers, and the largest ratio of the true sine to the bound, over all cases."""

    def __init__(self) -> None:
        self.cases = Counter[str]()
        self.unproven = Counter[str]()
        self.ratio: defaultdict[str, float] = defaultdict(float)
        self.side: defaultdict[str, int] = defaultdict(int)

    def add(self, solver: str, ok: bool, ratio: float, d: int) -> None:
        """Adds one case."""
        self.cases[solver] += 1
        self.unproven[solver] += not ok
        self.ratio[solver] = max(self.ratio[solver], ratio)
        self.side[solver] = max(self.side[solver], d)

    def rows(self) -> Iterator[str]:
        """Yields the table as text."""
        yield f"\n{'solver':12}{'cases':>8}{'not ok':>8}{'sine/bound at most':>20}{'up to':>8}"
        for name, count in sorted(self.cases.items()):
            yield (
                f"{name:12}{count:8}{self.unproven[name]:8}{self.ratio[name]:20.3f}"
                f"{self.side[name]:8}"
            )


@pytest.fixture(scope="module")
def table():
    found = Table()
    yield found
    print(*found.rows(), sep="\n")


def check(weight: Tensor, ranks: list[int | float], table: Table) -> None:
    """Compares truncated_svd at all ranks with LAPACK's SVD in float64."""
    exact = lapack(weight)
    d = min(weight.shape)
    for rank in ranks:
        basis = truncated_svd(weight, rank)
        k, bound = int(basis.rank), float(basis.bound)
        fewest, most = expected_columns(exact[1], rank)
        numerical = int((exact[1] > d * 2.0**-52 * exact[1][0]).sum())
        assert min(fewest, numerical // 2) <= k <= most, (rank, k, fewest, most)
        error = max(
            sine(right[:, :k], torch.linalg.qr(columns[:, :k].double())[0])
            for right, columns in ((exact[0], basis.U), (exact[2].mT, basis.V))
        )
        assert error <= max(bound, 1e-13), (rank, basis)
        assert basis.ok == (bound <= 1e-3)
        table.add(basis.solver, bool(basis.ok), error / max(bound, 1e-13), d)


def make_weight(spectrum: str, d: int, shape: str, dtype: torch.dtype) -> Tensor:
    """A weight with a planted spectrum, rounded to a dtype."""
    m, n = (math.ceil(d * side) for side in SHAPES[shape])
    return planted(m, n, SPECTRA[spectrum](d), seed=d)[0].to(dtype)


def spread_cases(sizes: Sequence[int]) -> list:
    """Lists (spectrum, d, shape, dtype): a diagonal of the product by day, all of it at night."""
    cases = []
    for d in sizes:
        for i, spectrum in enumerate(SPECTRA):
            for j, shape in enumerate(SHAPES):
                for k, dtype in enumerate(DTYPES):
                    by_day = (j, k) == (i % len(SHAPES), i % len(DTYPES))
                    marks = () if by_day else pytest.mark.slow
                    name = f"{spectrum} {d} {shape} {str(dtype)[6:]}"
                    cases.append(pytest.param(spectrum, d, shape, dtype, marks=marks, id=name))
    return cases


@pytest.mark.parametrize(("spectrum", "d", "shape", "dtype"), spread_cases((2, 5, 40, 400)))
def test_bound_is_never_below_the_true_sine(spectrum, d, shape, dtype, table):
    check(make_weight(spectrum, d, shape, dtype), list_ranks(d), table)


# These made a leading eigenspace that reached into the window at the cut: a bare RuntimeError.
STEEP = ("i^-2.5", ".9^i", "64 values from 1 to .01")


@pytest.mark.parametrize("spectrum", keep_some(SPECTRA, *STEEP))
def test_bound_is_never_below_the_true_sine_at_640(spectrum, table):
    check(make_weight(spectrum, 640, "square", torch.float32), [64, 320, 0.9, 0.99], table)


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("d", "dtype"), [(1280, torch.float32), (800, torch.float16)])
def test_bound_is_never_below_the_true_sine_on_large_weights(spectrum, d, dtype, table):
    check(make_weight(spectrum, d, "square", dtype), list_ranks(d), table)


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", ["i^-0.5", "i^-1.5", "exp(-i/20)", "one outlier", "stairs"])
def test_bound_is_never_below_the_true_sine_at_3072(spectrum, table):
    check(make_weight(spectrum, 3072, "square", torch.float32), [307, 0.9, 0.99], table)


@pytest.mark.parametrize(("spectrum", "d", "shape", "dtype"), spread_cases((2, 5, 40, 200)))
def test_project_matches_a_dense_computation_in_float64(spectrum, d, shape, dtype):
    source = make_weight(spectrum, d, shape, dtype)
    target = (source.float() + 1e-3 * source.float().norm() / d * randn(*source.shape, seed=1)).to(
        dtype
    )
    delta = randn(*source.shape, dtype=torch.float32, seed=2)
    factors = randn(len(source), 2, dtype=torch.float32), randn(2, source.shape[1], seed=3).float()
    for rank in (*ENERGY_RANKS, max(1, d // 3), max(1, d - 1), d):
        _, info = project(factors, source, target, rank=rank, return_info=True)
        columns = int(info.rank_source), int(info.rank_target)
        for w, k in zip((source, target), columns, strict=True):
            fewest, most = expected_columns(lapack(w)[1], rank)
            assert k <= most and (not info.ok or isinstance(rank, int) or k >= fewest)
        if not info.ok:
            continue
        # Four projectors, each off by the bound at most, and rounding of float32.
        allowed = 4 * float(info.bound) + 2e-6
        for update in (delta, LowRank(*factors)):
            moved = project(update, source, target, rank=rank)
            dense, found = (x.dense() if isinstance(x, LowRank) else x for x in (update, moved))
            exact = project_dense(
                dense.double(), source.double(), target.double(), *columns, "prolora"
            )
            assert float((found.double() - exact).norm()) <= allowed * float(dense.norm())


@pytest.mark.parametrize("spectrum", STEEP)
def test_project_and_similarity_accept_steep_weights(spectrum):
    source, target = (make_weight(spectrum, 640, "square", torch.float32) for _ in range(2))
    update = torch.ones(640, 2), torch.ones(2, 640)
    moved = project(update, source, target)
    # The same weight on both sides: everything but the mixed blocks is kept.
    u, s, vt = lapack(source)
    k = expected_columns(s, 0.99)[0]
    left, right = u[:, :k] @ u[:, :k].mT, vt[:k].mT @ vt[:k]
    dense = (update[0] @ update[1]).double()
    inside = left @ dense @ right
    outside = dense - left @ dense - dense @ right + inside
    assert (moved.dense().double() - inside - outside).norm() <= 1e-3 * dense.norm()
    similar = similarity(source, target, rank=0.99)
    assert float(similar.left) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("d", [4, 400, 800])
@pytest.mark.parametrize("rank", [3, 40, 0.99])
def test_empty_stacks_give_empty_results(d, rank):
    stack = torch.zeros(0, d, d)
    assert truncated_svd(stack, rank).bound.shape == (0,)
    assert similarity(stack, stack, rank=rank).left.shape == (0,)
    assert project(stack, stack, stack, rank=rank).shape == (0, d, d)
    assert project(stack, stack, stack, method="auto").shape == (0, d, d)
    factors = torch.zeros(0, d, 2), torch.zeros(0, 2, d)
    assert project(factors, stack, stack, rank=rank).shape == (0, d, d)


@pytest.mark.parametrize("bias", [torch.ones(3), torch.tensor(1.0)])
def test_project_rejects_a_bias(bias):
    with pytest.raises(ShapeMismatch, match="a bias has no singular subspaces"):
        project(bias, bias, bias)


@pytest.mark.parametrize("spectrum", STEEP)
def test_extract_and_transfer_accept_steep_weights(spectrum):
    weight = make_weight(spectrum, 640, "square", torch.float32)
    name = "blocks.0.to_q"
    base, tuned = weights(640, 640, seed=3), f"{name}.weight"
    extracted = prolora.extract({tuned: base}, {tuned: base + weight}, out_rank=16)
    u, s, vt = lapack(base + weight - base)
    found = extracted.adapter.updates[name].dense().double()
    assert (found - (u[:, :16] * s[:16]) @ vt[:16]).norm() <= 1e-3 * s.norm()

    factors = {
        f"{name}.lora_A.weight": torch.ones(2, 640),
        f"{name}.lora_B.weight": torch.ones(640, 2),
    }
    moved = prolora.transfer(factors, {tuned: weight}, {tuned: weight}, method="prolora")
    alone = project((torch.ones(640, 2), torch.ones(2, 640)), weight, weight).dense()
    error = moved.adapter.updates[name].dense() - alone
    assert error.norm() <= 1e-3 * alone.norm()
