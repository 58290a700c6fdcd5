"""The sum of updates is exact, what is measured of them is what dense matrices have."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import random_update

from prolora import LowRank
from prolora.core.merging import (
    balance_updates,
    inner_product,
    measure_overlap,
    merge_updates,
    sum_updates,
)
from prolora.errors import ShapeMismatch


def update(m, n, rank, seed):
    return random_update(m, n, rank, seed).to(torch.float32)


def dense(part):
    return part.up.double() @ part.down.double()


@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    ranks=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_the_sum_is_exact_and_of_no_more_columns_than_it_needs(m, n, ranks, seed):
    parts = [update(m, n, rank, seed + i) for i, rank in enumerate(ranks)]
    whole, wanted = sum_updates(parts), sum(map(dense, parts))
    assert (dense(whole) - wanted).norm() <= 1e-6 * max(1.0, wanted.norm())
    assert whole.rank <= max(ranks[0], min(m, n, sum(ranks)))
    assert sum_updates(parts[:1]) is parts[0]


@given(seed=st.integers(0, 99), ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_overlaps_and_products_are_those_of_dense_matrices(seed, ranks):
    a, b = (update(20, 14, rank, seed + i) for i, rank in enumerate(ranks))
    found = measure_overlap([a, b])
    assert inner_product(a, b) == pytest.approx(float((dense(a) * dense(b)).sum()), rel=1e-9)
    assert float(found.products[0, 1]) == inner_product(a, b)
    for side, bases in ((found.left, (a.up, b.up)), (found.right, (a.down.mT, b.down.mT))):
        q, r = (torch.linalg.qr(basis.double())[0] for basis in bases)
        phi = float((q.mT @ r).square().sum()) / min(ranks)
        assert float(side[0, 1]) == pytest.approx(phi, rel=1e-6)
        assert float(side[0, 0]) == pytest.approx(1.0)


def test_zeros_and_columns_that_repeat_have_the_overlap_of_what_they_span():
    a = update(20, 14, 2, 0)
    twice = LowRank(torch.cat([a.up, a.up], 1), torch.cat([a.down, a.down]))
    nothing = LowRank(a.up * 0, a.down)
    found = measure_overlap([a, twice, nothing])
    assert found.left[0, 1] == pytest.approx(1.0) and found.right[0, 1] == pytest.approx(1.0)
    assert found.left[0, 2] == 0 and found.products[2].abs().sum() == 0


def test_joined_factors_have_the_columns_they_span():
    """Two LoRAs with one `up` but for its rounding to float32: third and fourth σ are 1e-8."""
    a, b = update(20, 14, 2, 0), update(20, 14, 3, 1)
    other = update(20, 14, 2, 2).down
    joined = LowRank(torch.cat([a.up, 0.3 * a.up], 1), torch.cat([a.down, other]))
    plain = LowRank(a.up, a.down + 0.3 * other)
    found, wanted = measure_overlap([joined, b]), measure_overlap([plain, b])
    for side in ("left", "right"):
        phi = float(getattr(wanted, side)[0, 1])
        assert float(getattr(found, side)[0, 1]) == pytest.approx(phi, rel=1e-5)
    for one in (joined, joined.to(torch.float64)):
        cut = one.truncate(energy=1.0)
        assert cut.rank == 2
        assert (dense(cut) - dense(plain)).norm() < 1e-6 * dense(plain).norm()


def test_sum_is_exact_where_its_parts_cancel():
    """The columns are cut in float64: in float32 rounding of the large parts would stay."""
    large, small = update(4, 5, 4, 0), update(4, 5, 1, 1)
    small = LowRank(1e-4 * small.up, small.down)
    whole = sum_updates([large, small, LowRank(-large.up, large.down)])
    assert whole.rank == 4
    assert (dense(whole) - dense(small)).norm() < 1e-6 * dense(small).norm()


@pytest.mark.parametrize("what", [merge_updates, measure_overlap])
def test_updates_of_two_shapes_are_refused(what):
    with pytest.raises(ShapeMismatch, match="one shape"):
        what([update(4, 5, 1, 0), update(5, 4, 1, 0)])


@given(
    seed=st.integers(0, 99),
    count=st.integers(1, 4),
    alike=st.floats(0, 1),
    strengths=st.lists(st.sampled_from([1.0, 0.3, 2.0, -0.5]), min_size=4, max_size=4),
)
def test_a_balanced_sum_does_as_much_along_each_as_it_alone_and_no_more_than_the_sum(
    seed, count, alike, strengths
):
    common = update(20, 14, 3, seed)
    parts = []
    for i in range(count):
        own, s = update(20, 14, 3, 100 + seed + i), strengths[i]
        up = torch.cat([alike * common.up, (1 - alike) * own.up], 1)
        parts.append(LowRank(s * up, torch.cat([common.down, own.down])))
    factors = balance_updates(parts)
    assert all(0 <= factor <= 1 for factor in factors)
    products = torch.tensor([[inner_product(a, b) for b in parts] for a in parts]).clamp_min(0)
    reached = products @ torch.tensor(factors).to(products)
    wanted = products.diagonal()
    assert (reached >= wanted * (1 - 1e-6)).all()  # negative products count as 0
    # Whoever is weakened is weakened no further than needed.
    for k, factor in enumerate(factors):
        if 1e-6 < factor < 1 - 1e-6:
            assert reached[k] == pytest.approx(float(wanted[k]), rel=1e-5)


def test_equal_updates_are_done_once_and_orthogonal_ones_whole():
    a = update(20, 14, 3, 0)
    assert balance_updates([a, a, a]) == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert (dense(merge_updates([a, a], "balanced")) - dense(a)).norm() < 1e-6 * dense(a).norm()
    left = LowRank(torch.eye(20)[:, :2], torch.eye(14)[:2])
    right = LowRank(torch.eye(20)[:, 2:4], torch.eye(14)[2:4])
    assert balance_updates([left, right]) == pytest.approx([1.0, 1.0])
    weak, against = LowRank(0.3 * a.up, a.down), LowRank(-0.5 * a.up, a.down)
    assert balance_updates([a, weak]) == pytest.approx([1.0, 0.0], abs=1e-6)
    assert balance_updates([a, against]) == pytest.approx([1.0, 1.0])
    nothing = LowRank(0 * a.up, a.down)
    assert balance_updates([nothing, a]) == pytest.approx([1.0, 1.0])
    assert balance_updates([nothing, nothing]) == [1.0, 1.0]
