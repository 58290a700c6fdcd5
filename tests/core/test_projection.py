"""project: equal to the papers' dense formulas, and the properties every method must have."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from exchanged import Exchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples
from spectra import randn, random_update, related, weights

from prolora import METHODS, LowRank, project, truncated_svd
from prolora.core import reference
from prolora.errors import NonFiniteWeights, ShapeMismatch, UnrelatedBases, UnsupportedTensor

SHAPES = st.tuples(st.integers(2, 24), st.integers(2, 24))
METHOD = st.sampled_from(sorted(METHODS))


def case(m, n, r, seed, drift=0.3):
    """W_src, W_tgt and an update in float64."""
    source = weights(m, n, seed).double()
    return source, related(source, drift, seed + 1), random_update(m, n, r, seed + 2)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@given(SHAPES, st.integers(1, 6), METHOD, st.integers(0, 999), st.data())
@settings(max_examples=examples(120), deadline=None)
def test_factor_form_equals_the_dense_formula(shape, r, method, seed, data):
    """Also where a share of energy gives each base its own columns."""
    source, target, delta = case(*shape, r, seed)
    rank = data.draw(st.one_of(st.just(0.8), st.integers(1, min(shape))))
    ks, kt = (
        rank if isinstance(rank, int) else reference.columns_for_energy(w, rank)
        for w in (source, target)
    )
    expected = reference.project_dense(delta.dense(), source, target, ks, kt, method)
    factors, info = project(delta, source, target, rank=rank, method=method, return_info=True)
    dense = project(delta.dense(), source, target, rank=rank, method=method)
    scale = max(1.0, float(expected.norm()))
    assert (factors.dense() - expected).norm() < 1e-9 * scale
    assert (dense - expected).norm() < 1e-9 * scale
    assert (int(info.rank_source), int(info.rank_target)) == (ks, kt) and factors.rank <= 2 * r


@given(st.integers(2, 20), st.integers(1, 5), METHOD, st.integers(0, 999))
@settings(max_examples=examples(80), deadline=None)
def test_equal_square_bases_of_full_rank_make_every_method_the_identity(n, r, method, seed):
    source, _, delta = case(n, n, r, seed)
    moved = project(delta, source, source, rank=n, method=method)
    assert relative(moved.dense(), delta.dense()) < 1e-9


@given(st.integers(3, 20), st.integers(3, 20), st.integers(0, 999), st.data())
@settings(max_examples=examples(80), deadline=None)
def test_equal_bases_lose_exactly_the_mixed_blocks(m, n, seed, data):
    source, _, delta = case(m, n, 3, seed)
    k = data.draw(st.integers(1, min(m, n) - 1))
    parts = reference.split_blocks(delta.dense(), source, k)
    found, info = project(delta, source, source, rank=k, return_info=True)
    assert relative(found.dense(), parts["range"] + parts["null"]) < 1e-9
    energy = delta.dense().square().sum()
    for name, part in parts.items():
        share = getattr(info, f"{name}_energy")
        assert float(share) == pytest.approx(float(part.square().sum() / energy), abs=1e-9)


@given(SHAPES, METHOD, st.integers(0, 999), st.booleans(), st.data())
@settings(max_examples=examples(80), deadline=None)
def test_flipping_singular_pair_signs_changes_nothing(shape, method, seed, turning, data):
    """Nor does a rotation inside a cluster, whose equal values leave their vectors undefined."""
    source, target, delta = case(*shape, 3, seed)
    k = data.draw(st.integers(1, min(shape)))
    bases = [truncated_svd(w, k) for w in (source, target)]
    flips = st.lists(st.sampled_from([-1.0, 1.0]), min_size=k, max_size=k)
    turn = torch.tensor(data.draw(flips), dtype=torch.float64).diag()
    if turning:
        turn = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0]
    turned = [replace(basis, U=basis.U @ turn, V=basis.V @ turn) for basis in bases]
    before, info = project(delta, *bases, method=method, return_info=True)
    after, info_after = project(delta, *turned, method=method, return_info=True)
    assert (before.dense() - after.dense()).norm() < 1e-10 * max(1, float(before.norm()))
    assert info.similarity.left == pytest.approx(float(info_after.similarity.left), abs=1e-12)
    assert info.copy_distance == pytest.approx(float(info_after.copy_distance), abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_contraction_and_the_account_adds_up(method):
    source, target, delta = case(20, 16, 4, seed=3)
    found, info = project(delta, source, target, rank=6, method=method, return_info=True)
    blocks = info.range_energy + info.null_energy + info.range_null_energy + info.null_range_energy
    assert float(blocks) == pytest.approx(1)
    assert float(info.norm_ratio) <= 1 + 1e-9
    ratio = float(found.dense().norm() / delta.dense().norm())
    assert float(info.norm_ratio) == pytest.approx(ratio)
    assert float(info.surviving_energy) == pytest.approx(ratio**2)
    distance = relative(found.dense(), delta.dense())
    assert float(info.copy_distance) == pytest.approx(distance, abs=1e-7)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
)
def test_any_float_dtype_goes_in_and_comes_out(dtype):
    source, target, delta = case(16, 12, 3, seed=1)
    small = delta.dense().float() * 0.3
    stored = small.to(dtype)
    found = project(stored, source.to(dtype), target.to(dtype), rank=5)
    assert found.dtype == dtype and found.shape == stored.shape
    wide = [x.to(dtype).double() for x in (stored, source, target)]
    exact = reference.project_dense(*wide, 5, 5, "prolora")
    assert relative(found.to(torch.float64), exact) < 2 * torch.finfo(dtype).eps + 1e-5
    factors = project(LowRank(delta.up.to(dtype), delta.down.to(dtype)), source, target, rank=5)
    assert factors.dtype == dtype


def test_a_convolution_of_five_axes_is_its_flattened_matrix_too():
    ws, wt, delta = randn(3, 6, 4, 1, 2, 2)
    flat = [x.flatten(1) for x in (delta, ws, wt)]
    for method, wanted in (("prolora", project(*flat, rank=4)), ("copy", flat[0])):
        found = project(delta, ws, wt, rank=4, method=method)
        assert found.shape == delta.shape
        torch.testing.assert_close(found.flatten(1), wanted)
    bases = truncated_svd(ws, 4), truncated_svd(flat[1], 4)
    assert bases[0].shape == (6, 16) and torch.equal(bases[0].U, bases[1].U)
    torch.testing.assert_close(project(delta, *bases), project(delta, ws, ws, rank=4))


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (1, 3, 3)], ids=str)
def test_the_pair_of_a_convolution_comes_back_as_it_came(kernel):
    """As files have it: up [out, r, 1, …], down [r, in, …]."""
    source, target = torch.randn(2, 24, 12 * torch.Size(kernel).numel())
    up, down = torch.randn(24, 4, *[1] * len(kernel)), torch.randn(4, 12, *kernel)
    conv = [w.unflatten(1, (12, *kernel)) for w in (source, target)]
    moved = project((up, down), *conv, rank=8)
    wanted = project(LowRank(up.flatten(1), down.flatten(1)), source, target, rank=8)
    assert torch.equal(moved[0], wanted.up.reshape(24, -1, *up.shape[2:]))
    assert torch.equal(moved[1], wanted.down.reshape(-1, 12, *kernel))


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_of_updates_is_moved_as_one_after_the_other(method):
    """Of as many weights or bases, or of one, on either side."""
    cases = [case(12, 18, 4, seed) for seed in range(3)]
    sources, targets = (torch.stack([c[i] for c in cases]) for i in (0, 1))
    source, target, _ = cases[0]
    stack = LowRank(*(torch.stack([getattr(c[2], x) for c in cases]) for x in ("up", "down")))
    for ws, wt in (
        (sources, targets),
        (source, target),
        (truncated_svd(source, 0.7), truncated_svd(target, 0.7)),
        (source, targets),
        (sources, truncated_svd(target, 0.7)),
    ):
        options = {"rank": 0.7, "method": method}
        moved, info = project(stack, ws, wt, **options, return_info=True)
        dense = project(stack.dense(), ws, wt, **options)
        for i, (_, _, update) in enumerate(cases):
            pair = [w[i] if w is sources or w is targets else w for w in (ws, wt)]
            alone, one = project(update, *pair, **options, return_info=True)
            torch.testing.assert_close(moved.dense()[i], alone.dense())
            torch.testing.assert_close(dense[i], alone.dense())
            assert float(info.norm_ratio[i]) == pytest.approx(float(one.norm_ratio))
            assert float(info.surviving_energy[i]) == pytest.approx(float(one.surviving_energy))
    assert torch.equal(project(stack.dense(), source, target, method="auto"), stack.dense())


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_a_dense_update_takes_its_identity_on_the_short_side(monkeypatch, shape):
    source, target, delta = case(*shape, 4, 0)
    ranks = []
    split = sys.modules["prolora.core.projection"]._split_sides

    def look(factors, *bases):
        ranks.append(factors.rank)
        return split(factors, *bases)

    monkeypatch.setattr(sys.modules["prolora.core.projection"], "_split_sides", look)
    found, _ = project(delta.dense(), source, target, rank=9, return_info=True)
    expected = reference.project_dense(delta.dense(), source, target, 9, 9, "prolora")
    assert ranks == [40] and relative(found, expected) < 1e-9


def test_any_library_with_dlpack_gets_its_own_arrays_back(monkeypatch):
    """What cupy does, done by a stand-in: cupy itself needs a GPU to make an array."""
    fake = types.ModuleType("fakecupy")
    ndarray = type("ndarray", (Exchanged,), {"__module__": "fakecupy.core"})
    fake.from_dlpack = lambda x: ndarray(torch.from_dlpack(x))
    monkeypatch.setitem(sys.modules, "fakecupy", fake)
    source, target, delta = case(9, 7, 2, seed=0)
    found = project(ndarray(delta.dense()), ndarray(source), ndarray(target), rank=3)
    assert type(found) is ndarray
    torch.testing.assert_close(found.tensor, project(delta.dense(), source, target, rank=3))


def test_a_zero_update_stays_zero_and_its_account_is_finite():
    source, target, _ = case(9, 7, 2, seed=0)
    found, info = project(torch.zeros(9, 7), source, target, rank=3, return_info=True)
    assert found.abs().max() == 0
    assert float(info.norm_ratio) == 0 and float(info.copy_distance) == 0


def test_bad_input_is_refused_by_name():
    source, target, delta = case(9, 7, 2, seed=0)
    broken, stack = target.clone(), torch.randn(3, 9, 7)
    broken[0, 0] = torch.inf
    kernels = torch.randn(16, 8, 3, 3), torch.randn(16, 72, 1, 1)  # of one size

    def multiply(update, *_):
        return update.up @ update.down

    known = r"'magic': choose from auto, prolora, "
    for operands, options, kind, words in (
        ((delta, source, target.T), {"rank": 3}, ShapeMismatch, "W_tgt.*transposed"),
        (((torch.ones(16, 2), torch.ones(2, 72)), *kernels), {}, ShapeMismatch, "W_tgt"),
        ((stack[:2], stack, stack), {}, ShapeMismatch, "2 updates but 3 weights; give as many"),
        ((stack, stack[0], stack[0, :, :5]), {}, ShapeMismatch, "fits weights of its own shape"),
        ((stack[:2], stack[:2, :7], stack[:2]), {}, ShapeMismatch, "fits weights of its own shape"),
        ((delta, source, broken), {"rank": 3}, NonFiniteWeights, "W_tgt"),
        (((delta.up * torch.nan, delta.down), source, target), {}, NonFiniteWeights, r"delta\.up"),
        ((delta, source, target), {"rank": 0}, ValueError, "rank must be"),
        ((delta, source, target), {"method": "magic"}, ValueError, known),
        ((delta, source, target), {"method": "best"}, ValueError, r"'best'.*`transfer\(\)`"),
        ((delta, source, target), {"method": "fit"}, ValueError, r"'fit'.*`fit\(\)`"),
        (([[1.0]], source, target), {"rank": 3}, TypeError, "__dlpack__"),
        (
            ((delta.up, delta.down), source, target),
            {"method": multiply},
            UnsupportedTensor,
            r"returned one array; return factors, \(up, down",
        ),
    ):
        with pytest.raises(kind, match=words):
            project(*operands, **options)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_taken_as_updates_and_gradients_reach_them(method):
    source, target = weights(24, 30, 0), weights(24, 30, 1)
    up = torch.nn.Parameter(torch.randn(24, 3))
    down = torch.nn.Parameter(torch.randn(3, 30))
    moved = project((up, down), source, target, rank=8, method=method)
    dense = project(up @ down, source, target, rank=8, method=method)
    assert torch.allclose(moved.dense(), dense, atol=1e-5)
    wanted = torch.autograd.grad(dense.square().sum(), (up, down))
    for found, right in zip(
        torch.autograd.grad(moved.dense().square().sum(), (up, down)), wanted, strict=True
    ):
        assert torch.allclose(found, right, rtol=1e-3, atol=1e-4)


def test_what_needs_no_bases_factorises_nothing(monkeypatch):
    source, target, delta = case(9, 7, 2, seed=0)

    def refuse(*args, **options):
        raise AssertionError("an SVD that nobody needs")

    monkeypatch.setattr(sys.modules["prolora.core.projection"], "truncated_svd", refuse)
    copied = project(delta, source, target, method="copy")
    assert torch.equal(copied.up, delta.up) and copied.up.data_ptr() != delta.up.data_ptr()
    dense = delta.dense()
    copied = project(dense, source, target, method="copy")
    assert torch.equal(copied, dense) and copied.data_ptr() != dense.data_ptr()


def learnt(m, n, seed, size):
    """A target that has learnt something new along few directions."""
    source = weights(m, n, seed).double()
    new = random_update(m, n, 6, seed + 1).dense()
    return source, source + size * source.norm() * new / new.norm()


@pytest.mark.parametrize("broken", ["unrelated", "basis", "zeros", "nan", "a stack"])
def test_auto_refuses_what_it_cannot_decide_from(broken):
    source, target, delta = case(32, 24, 3, 0)
    kind, words = UnrelatedBases, "nothing in common"
    if broken == "unrelated":
        target = weights(32, 24, 9).double()
    elif broken == "a stack":
        delta = delta.dense().expand(2, -1, -1)
        target = weights(32, 24, 9).double().expand(2, -1, -1)
    elif broken == "basis":
        source, kind, words = truncated_svd(source, 8), ValueError, "Basis"
    elif broken == "zeros":
        source, target = torch.zeros_like(source), torch.zeros_like(target)
    else:
        target, kind, words = target.clone(), ValueError, "NaN"
        target[3, 2] = torch.nan
    with pytest.raises(kind, match=words):
        project(delta, source, target, method="auto")


def test_auto_is_linear_in_the_update_and_has_its_derivative():
    source, target = learnt(32, 24, 5, 0.15)
    delta = torch.randn(32, 24, dtype=torch.float64, requires_grad=True)
    (project(delta, source, target, method="auto") ** 2).sum().backward()
    assert delta.grad is not None and bool(delta.grad.isfinite().all())
    with torch.no_grad():
        twice = project(2 * delta, source, target, method="auto")
        assert relative(twice, 2 * project(delta, source, target, method="auto")) < 1e-9
