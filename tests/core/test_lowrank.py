"""LowRank: products that are never multiplied out, and their best truncation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples
from spectra import planted, randn, random_update

from prolora import LowRank, truncated_svd
from prolora.core import recompression
from prolora.core.svd import stacks
from prolora.errors import ShapeMismatch, SolverFailure


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 24), st.integers(0, 99))
@settings(max_examples=examples(80), deadline=None)
def test_norm_and_refactoring_equal_the_dense_product(m, n, r, seed):
    update = random_update(m, n, r, seed)
    dense = update.dense()
    assert update.norm() == pytest.approx(float(dense.norm()), rel=1e-10)
    refactored = update.truncate()
    assert refactored.rank <= min(m, n, r)
    torch.testing.assert_close(refactored.dense(), dense)


def test_truncation_is_eckart_young():
    update = random_update(30, 20, 8)
    u, s, vt = torch.linalg.svd(update.dense())
    best = u[:, :3] * s[:3] @ vt[:3]
    torch.testing.assert_close(update.truncate(rank=3).dense(), best)
    share = float((s[:3] ** 2).sum() / (s**2).sum())
    assert update.truncate(energy=share - 1e-9).rank == 3
    assert update.truncate(energy=share + 1e-9).rank == 4


def test_all_of_the_energy_needs_no_column_of_rounding():
    weight = planted(30, 20, torch.tensor([1.0, 0.5, 1e-7]))[0]
    cut = LowRank(weight, torch.eye(20).double()).truncate(energy=1.0)
    assert cut.rank == 2
    torch.testing.assert_close(cut.dense(), weight, rtol=0, atol=1.1e-7)


def test_a_stack_is_truncated_like_its_members():
    stack = random_update(12, 9, 5, batch=(3,))
    cut = stack.truncate(rank=2)
    for i in range(3):
        alone = LowRank(stack.up[i], stack.down[i]).truncate(rank=2)
        torch.testing.assert_close(cut.dense()[i], alone.dense())


def test_factors_that_do_not_multiply_and_senseless_truncations_are_refused():
    for up, down in (((3, 2), (3, 4)), ((3,), (3,)), ((2, 3, 2), (2, 4))):
        with pytest.raises(ShapeMismatch, match="do not multiply"):
            LowRank(torch.zeros(up), torch.zeros(down))
    for options in ({"rank": 0}, {"energy": 1.5}, {"energy": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            random_update(4, 4, 2).truncate(**options)


def test_truncating_parameters_gives_values_without_gradients():
    up, down = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((20, 4), (4, 30)))
    cut = LowRank(up, down).truncate(rank=2)
    assert cut.rank == 2 and not cut.up.requires_grad and not cut.down.requires_grad


def test_an_update_and_a_basis_are_equal_to_themselves_alone():
    """Tensors have no truth value to compare by."""
    one, other = random_update(3, 4, 2), random_update(3, 4, 2)
    assert one == one and one != other and len({one, other}) == 2
    basis = truncated_svd(torch.eye(4), 2)
    assert basis == basis and basis != truncated_svd(torch.eye(4), 2)


@pytest.mark.parametrize("failing", [False, True])
def test_products_wider_than_the_kernel_are_truncated_as_one_stack_on_a_gpu(failing, monkeypatch):
    """Of full rank, of rank 3, of zeros, huge, tiny; and one that the batched solver fails on."""
    monkeypatch.setattr(stacks, "FORCE_BATCHED", True)
    core = randn(5, 150, 135).float()
    core[1] = core[1, :, :3] @ core[1, :3]
    core[2] = 0
    core[3] *= 1e30
    core[4] *= 1e-30
    if failing:
        solve = recompression.descending_eigh

        def fail(symmetric):
            return tuple(x.index_fill(0, torch.tensor([1]), torch.nan) for x in solve(symmetric))

        monkeypatch.setattr(recompression, "descending_eigh", fail)
    found = LowRank(core, torch.eye(135).expand(5, -1, -1)).truncate()
    exact = torch.linalg.svdvals(core.double())
    size, unit = exact.norm(dim=1), 135 * 2.0**-23
    for values in (found.up.double().square().sum(1), found.down.double().square().sum(2)):
        assert ((values - exact).abs().amax(1) <= 5 * unit * exact[:, 0]).all()  # balanced
    rebuilt = found.up.double() @ found.down.double()
    assert ((rebuilt - core).norm(dim=(1, 2)) <= 3 * unit * size).all()
    if not failing:
        assert not found.up[1, :, 3:].any() and not found.up[2].any()


def test_energies_of_a_stack_are_those_of_its_products(monkeypatch):
    stack = random_update(40, 30, 6, batch=(2, 3)).to(torch.float32)
    exact = torch.linalg.svdvals(stack.dense().double())[..., :6].square()
    energies = recompression.product_energies(*stack)
    torch.testing.assert_close(energies, exact, rtol=1e-5, atol=0)
    monkeypatch.setattr(recompression, "eigenvalue_stack", lambda x: x[..., 0] * torch.nan)
    with pytest.raises(SolverFailure, match="did not converge"):
        recompression.product_energies(*stack)


def of_grams(up, down):
    dtype = up.dtype
    up, down = up.double(), down.double()
    return recompression.factor_product_by_grams(up, down, up @ up.mT, down @ down.mT, dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-7)])
def test_a_product_by_known_grams_comes_back_however_close_its_rows_lie(dtype, tolerance):
    """Some of these go by Cholesky, some by reflections, side by side in a stack."""
    up, down = (x.mT for x in vars(random_update(60, 50, 6, batch=(5,))).values())
    up, down = torch.linalg.qr(up.mT)[0].mT, down.mT
    for i, condition in enumerate((1.0, 1e2, 1e6, 10.0, 1e12)):
        spread = torch.logspace(0, -1, 6, base=condition, dtype=torch.float64)
        up[i] = torch.linalg.qr(random_update(6, 6, 6, i).up)[0] * spread @ up[i]
    up[3, 2] = 0
    up[3, 4] = up[3, 1]
    up, down = up.to(dtype), down.to(dtype)
    found = of_grams(up, down)
    u, v = found.left.mT @ found.u, found.right.mT @ found.v
    wanted = up.double().mT @ down.double()
    error = (u * found.s.unsqueeze(-2) @ v.mT - wanted).norm(dim=(1, 2))
    assert (error <= tolerance * wanted.norm(dim=(1, 2))).all()
    assert (found.s.diff(dim=-1) <= 0).all()
    for i, values in enumerate(found.s):
        # Of what is rounding beside the largest, nothing is promised.
        rank = int((values > tolerance * values[0]).sum())
        used = u[i, :, :rank]
        assert rank >= 3
        assert (used.mT @ used - torch.eye(rank)).abs().max() < 10 * tolerance


def test_parts_that_are_orthogonal_merge_in_descending_order():
    q, p = torch.linalg.qr(torch.randn(2, 40, 6, dtype=torch.float64))[0].mT.chunk(2, -2)
    x, y = torch.linalg.qr(torch.randn(2, 30, 6, dtype=torch.float64))[0].mT.chunk(2, -2)
    weak = torch.tensor([1.0, 0.1, 1e-3], dtype=torch.float64)[:, None]
    parts = [of_grams(weak * q, x), of_grams(p, 0.5 * y)]
    up, s, down, order = recompression.merge_products(parts, torch.float64)
    assert torch.allclose(up.mT @ down, (weak * q).mT @ x + p.mT @ (0.5 * y), atol=1e-12)
    wanted = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.1, 1e-3], dtype=torch.float64)
    assert torch.allclose(s.take_along_dim(order, -1), wanted.expand(2, -1))
    assert torch.allclose((up * up).sum(-1), s)  # balanced


def test_a_value_prints_its_shape_rank_and_dtype():
    update = LowRank(torch.zeros(64, 8), torch.zeros(8, 48))
    assert repr(update) == "LowRank(64×48, rank 8, float32)"
    stack = LowRank(torch.zeros(3, 64, 8).half(), torch.zeros(3, 8, 48).half())
    assert repr(stack.to("meta")) == "LowRank(3 of 64×48, rank 8, float16 on meta)"
