"""SVDs of thin products from inner products that are known already."""

import pytest
import torch
from torch import Tensor

from prolora.core import recompression
from prolora.core.recompression import (
    ProductSvd,
    core_svd,
    factor_product_by_grams,
    merge_products,
    product_energies,
)
from prolora.core.svd import stacks
from prolora.errors import SolverFailure


def panels(conditions: list[float], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """up [b, r, m] and down [b, r, n] as rows; singular values of up over that many decades."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ups = []
    for condition in conditions:
        q = torch.linalg.qr(normal(60, 6))[0]
        spread = torch.logspace(0, -1, 6, base=condition, dtype=torch.float64)
        ups.append(torch.linalg.qr(normal(6, 6))[0] * spread @ q.mT)
    return torch.stack(ups).to(dtype), normal(len(conditions), 6, 50).to(dtype)


def of_grams(up: Tensor, down: Tensor) -> ProductSvd:
    dtype = up.dtype
    up, down = up.double(), down.double()
    return factor_product_by_grams(up, down, up @ up.mT, down @ down.mT, dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-7)])
def test_the_product_comes_back_however_close_its_rows_lie(dtype, tolerance):
    """Some of these go by Cholesky, some by reflections, side by side in a stack."""
    up, down = panels([1.0, 1e2, 1e6, 10.0, 1e12], dtype)
    up[3, 2] = 0
    up[3, 4] = up[3, 1]
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
    up, s, down, order = merge_products(
        [of_grams(weak * q, x), of_grams(p, 0.5 * y)], torch.float64
    )
    assert torch.allclose(up.mT @ down, (weak * q).mT @ x + p.mT @ (0.5 * y), atol=1e-12)
    wanted = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.1, 1e-3], dtype=torch.float64)
    assert torch.allclose(s.take_along_dim(order, -1), wanted.expand(2, -1))
    assert torch.allclose((up * up).sum(-1), s)  # balanced


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("shape", [(150, 135), (135, 150)], ids=str)
def test_cores_wider_than_the_kernel_go_as_one_stack_on_a_gpu(shape, failing, monkeypatch):
    """Of full rank, of rank 3, of zeros, huge, tiny; and one that the batched solver fails on."""
    monkeypatch.setattr(stacks, "FORCE_BATCHED", True)
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(5, *shape, generator=generator)
    core[1] = core[1, :, :3] @ core[1, :3]
    core[2] = 0
    core[3] *= 1e30
    core[4] *= 1e-30
    if failing:
        solve = recompression.descending_eigh

        def fail(symmetric):
            return tuple(x.index_fill(0, torch.tensor([1]), torch.nan) for x in solve(symmetric))

        monkeypatch.setattr(recompression, "descending_eigh", fail)
    u, s, v = core_svd(core)
    exact = torch.linalg.svdvals(core.double())
    unit = 135 * 2.0**-23
    assert ((s - exact).abs() <= 3 * unit * exact[:, :1]).all()
    rebuilt = (u.double() * s.double()[:, None]) @ v.double().mT
    assert ((rebuilt - core).norm(dim=(1, 2)) <= 3 * unit * core.double().norm(dim=(1, 2))).all()
    for x in (u[[0, 3, 4]], v[[0, 3, 4]]):
        assert (x.mT @ x - torch.eye(135)).norm(dim=(1, 2)).max() <= 3 * unit
    if not failing:
        assert not s[1, 3:].any() and not s[2].any()


def test_energies_of_a_stack_are_those_of_its_products(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(2, 3, *shape, generator=generator) for shape in ((40, 6), (6, 30)))
    together = product_energies(up, down)
    exact = torch.linalg.svdvals((up @ down).double())[..., :6].square()
    torch.testing.assert_close(together, exact, rtol=1e-5, atol=0)
    monkeypatch.setattr(recompression, "eigenvalue_stack", lambda x: x[..., 0] * torch.nan)
    with pytest.raises(SolverFailure, match="did not converge"):
        product_energies(up, down)
