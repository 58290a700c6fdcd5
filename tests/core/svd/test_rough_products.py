"""Float32 away from the cut: whatever its products lose, the bound says so."""

import pytest
import torch
from diagonal import pair_up
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import lapack, orthonormal, planted, power_law, true_error

from prolora import truncated_svd
from prolora.core.svd import stacks
from prolora.core.svd.products import ImpliedGram

D, K = 768, 48


def off_in_all(size, dropped):
    generator = torch.Generator().manual_seed(3)
    return lambda x: size * torch.randn(x.shape, generator=generator) / x.shape[-1] ** 0.5


def towards_a_dropped_vector(size, dropped):
    return lambda x: size * dropped.expand_as(x)


def of_one_row(size, dropped):
    def spoil(x):
        wrong = torch.zeros_like(x)
        wrong[:, x.shape[1] // 2 :: x.shape[1]] = size * dropped
        return wrong

    return spoil


@pytest.mark.parametrize(
    ("error", "size"),
    pair_up([off_in_all, towards_a_dropped_vector, of_one_row], [1e-7, 1e-5, 1e-4]),
)
def test_no_error_of_the_float32_products_puts_the_bound_below_the_sine(monkeypatch, error, size):
    weight, u, _ = planted(D, D + 40, power_law(D, 0.5))
    spoil = error(size, u[:, K].float())
    rough = ImpliedGram.multiply_f32

    def wrong(self, x):
        wide = x.shape[1] != 12  # the blocks of the basis are left alone
        return rough(self, x) + (spoil(x) if wide else 0)

    monkeypatch.setattr(ImpliedGram, "multiply_f32", wrong)
    weight = weight.float()
    basis = truncated_svd(weight, K)
    assert true_error(lapack(weight), basis) <= float(basis.bound)
    assert basis.ok
    if size <= 1e-7:
        assert basis.solver == "krylov"
    if size >= 1e-4:
        assert basis.solver != "krylov"


VECTORS = {}


def vectors(m, d):
    """Orthonormal columns, made once."""
    generator = torch.Generator().manual_seed(m)
    return VECTORS.setdefault((m, d), orthonormal(m, d, generator))


@st.composite
def spectra(draw):
    """A width, columns and values: a power law with clusters, a gap of any size, or of low rank."""
    d = draw(st.sampled_from([400, 400, 768]))
    k = draw(st.integers(8, 96)) if d == 768 else draw(st.integers(1, d - 1))
    values = power_law(d, draw(st.sampled_from([0.3, 0.5, 1.0, 1.5])))
    kind = draw(st.sampled_from(["plain", "gap", "cluster", "low rank"]))
    if kind == "gap":
        values[k:] = values[k:].clamp_max(float(values[k - 1]) * (1 - 10 ** -draw(st.floats(0, 8))))
    elif kind == "cluster":
        first, size = max(0, k - draw(st.integers(1, 40))), draw(st.integers(2, 80))
        near = 1 - 10 ** -draw(st.floats(2, 9)) * torch.arange(len(values[first : first + size]))
        values[first : first + size] = values[first] * near
    elif kind == "low rank":
        values[draw(st.integers(1, d - 1)) :] = 0
    scale = draw(st.sampled_from([1.0, 1e-20, 1e20, 1e-6]))
    return d, k, values.sort(descending=True)[0] * scale


@settings(max_examples=10, deadline=None)
@given(spectra(), st.booleans(), st.sampled_from([0, 30]))
def test_on_any_spectrum_the_bound_is_not_below_the_sine(case, whole_stacks, more):
    d, k, values = case
    weight = ((vectors(d, d) * values) @ vectors(d + more, d).mT).float()
    before, stacks.FORCE_BATCHED = stacks.FORCE_BATCHED, whole_stacks
    try:
        basis = truncated_svd(weight, k)
    finally:
        stacks.FORCE_BATCHED = before
    bound = float(basis.bound)
    assert bound >= 1 or true_error(lapack(weight), basis) <= bound
    assert bool(basis.ok) == (bound <= 1e-3)
