"""The ops as torch operators: errors, leading dimensions, layouts, compile, fakes, devices."""

import pytest
import torch
from backends import Kernels, load
from spectra import randn
from torch._subclasses.fake_tensor import FakeTensorMode

from prolora import errors
from prolora.core.ops import probe
from prolora.core.ops.krylov_block import krylov_block
from prolora.core.ops.panel_qr import panel_qr, run_panel_qr
from prolora.core.ops.precise_product import precise_product
from prolora.core.ops.project_pair import project_pair
from prolora.core.ops.small_svd import run_small_svd, small_singular_values, small_svd
from prolora.core.ops.subspace_overlap import subspace_overlap
from prolora.core.ops.tridiagonal import tridiagonal_values, tridiagonal_vectors, tridiagonalise


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


HALF, DOUBLE = torch.float16, torch.float64
W, ROWS, PROJECTED = zeros(2, 40, 48, dtype=HALF), zeros(2, 24, 40), zeros(2, 24, 24)
WIDE = zeros(1, 80, 80, dtype=HALF), zeros(1, 70, 80), zeros(1, 70, 70)
X, T = zeros(2, 4, 6), zeros(1, 3, dtype=DOUBLE)
# An op, what it does not take, and words of the TypeError or the ShapeMismatch that says so.
WRONG_KINDS = [
    *((op, (zeros(2, 3, 2, dtype=HALF),), "float16") for op in (small_svd, small_singular_values)),
    *((small_svd, (zeros(2, 3, 2).to(x),), str(x)) for x in (torch.int64, torch.complex64)),
    *((op, ([[1.0]],), r"must be a torch\.Tensor, not list") for op in (panel_qr, small_svd)),
    (subspace_overlap, ([X], [X.double()]), "float32.*float64"),
    (subspace_overlap, ([X, X.double()], [X, X.double()]), "one dtype and device"),
    (subspace_overlap, ([X.half()], [X.half()]), "float16"),
    (project_pair, (X.half(), X.half(), X.mT.half()), "float16"),
    (panel_qr, (X.double(),), "panel must be float32"),
    (panel_qr, (X, zeros(2)), "scale must be float64"),
    (krylov_block, (W.float(), ROWS, PROJECTED, 16, 8), "w must be float16 or bfloat16, not"),
    (krylov_block, (W, ROWS.double(), PROJECTED, 16, 8), "rows must be float32"),
    (krylov_block, (W, ROWS, [1.0], 16, 8), r"projected must be a torch\.Tensor, not list"),
    (krylov_block, (W, ROWS[:, ::2], PROJECTED, 8, 8), "rows must be a contiguous stack"),
    (krylov_block, (W[:, ::2], ROWS, PROJECTED, 16, 8), "w must be a contiguous stack"),
    (krylov_block, (W, ROWS.to("meta"), PROJECTED, 16, 8), "w is on cpu, but rows is on meta"),
    (precise_product, (X.long(), X), "x must be of 16, 32 or 64 bits"),
    (precise_product, (X, X.to("meta")), "x is on cpu, but y is on meta"),
    (tridiagonalise, (zeros(1, 3, 3, dtype=HALF),), "tridiagonalise: takes"),
    (tridiagonal_values, (T, T.float(), 2), "beside must be float64"),
]
PRODUCT = r"takes \[b, r, p\] and \[b, c, p\], p >= 1"
WRONG_SHAPES = [
    *((op, (zeros(3, 4),), r"use torch\.linalg\.svd") for op in (small_svd, small_singular_values)),
    (small_svd, (zeros(1000, 129),), r"use torch\.linalg\.svd"),
    *((panel_qr, (zeros(*shape),), r"use torch\.linalg\.qr") for shape in ((5, 4), (129, 400))),
    (panel_qr, (X, zeros(1, dtype=DOUBLE)), "one number a panel"),
    (subspace_overlap, ([X], [X[:, :3]]), r"\(2, 4, 6\).*\(2, 3, 6\)"),
    (subspace_overlap, ([X], [X[:1]]), "must agree"),
    (project_pair, (X, X[:, :3], X.mT), r"\(2, 4, 6\).*\(2, 3, 6\)"),
    (
        krylov_block,
        (W[:1], ROWS, PROJECTED, 16, 8),
        r"rows must be \(1, 24, 40\), not \(2, 24, 40\)",
    ),
    (krylov_block, (W, ROWS, zeros(2, 24, 23), 16, 8), "projected must be"),
    (krylov_block, (W, ROWS, PROJECTED, 16, 17), "not width 17"),
    (krylov_block, (*WIDE, 66, 65), "width <= d and 64; not width 65"),
    *((krylov_block, (W, ROWS, PROJECTED, size, 8), f"size {size}") for size in (25, 4, -8)),
    (krylov_block, (W, ROWS, PROJECTED, 16, 0), "not width 0"),
    *((precise_product, (X, y), PRODUCT) for y in (X[:1], X[:, :, :-1], X[0])),
    (precise_product, (X[:, :, :0], X[:, :, :0]), PRODUCT),
    *((tridiagonalise, (zeros(*x),), "takes") for x in ((3, 3), (1, 3, 4), (1, 0, 0))),
    (tridiagonal_values, (T, T, 4), "tridiagonal: takes two"),
    (tridiagonal_values, (T, T[:, :2], 2), "tridiagonal: takes two"),
    (tridiagonal_vectors, (T, T, zeros(1, 4, dtype=DOUBLE)), "tridiagonal"),
]


@pytest.mark.parametrize(("op", "operands", "words"), WRONG_KINDS)
def test_operands_of_another_kind_are_refused_by_name(op, operands, words):
    with pytest.raises(TypeError, match=words):
        op(*operands)


@pytest.mark.parametrize(("op", "operands", "words"), WRONG_SHAPES)
def test_shapes_that_do_not_agree_or_are_too_large_are_refused(op, operands, words):
    with pytest.raises(errors.ShapeMismatch, match=words):
        op(*operands)


def test_the_operator_itself_refuses_what_it_would_read_or_write_wrongly():
    rows, projected = ROWS.clone(), PROJECTED.clone()
    for wrong, kind in (
        ((W[:, :, ::2], rows, projected, 16, 8), TypeError),
        ((W, rows, projected, 32, 8), errors.ShapeMismatch),
        ((W, rows, projected, 8, 16), errors.ShapeMismatch),
    ):
        with pytest.raises(kind, match="krylov_block"):
            torch.ops.prolora.krylov_block(*wrong)
    assert torch.equal(rows, ROWS) and torch.equal(projected, PROJECTED)


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0)], ids=str)
def test_leading_dimensions_are_kept(lead):
    u, x = randn(*lead, 9, 4), randn(*lead, 2, 9)
    split, _ = project_pair(u, u, x)
    torch.testing.assert_close(split[..., :2, :] + split[..., 2:, :], x)
    (shared,) = subspace_overlap([u], [u])
    torch.testing.assert_close(shared, (u.mT @ u).square().sum((-2, -1)))
    left, s, v = small_svd(u)
    assert (left.shape, s.shape, v.shape) == (u.shape, (*lead, 4), (*lead, 4, 4))
    torch.testing.assert_close((left * s[..., None, :]) @ v.mT, u)
    torch.testing.assert_close(small_singular_values(u), s)
    (thin,) = single(u.mT)
    q, lower, rank = panel_qr(thin)
    assert rank.shape == lead
    torch.testing.assert_close(lower @ q, thin)


def single(*tensors):
    """In float32, which two ops have kernels for; with the strides that they have."""
    return [x.float() for x in tensors]


def test_layout_in_memory_does_not_matter(kernels):
    u = randn(2, 4, 9).mT
    x = randn(2, 18, 3)[:, ::2].mT
    assert not u.is_contiguous() and not x.is_contiguous()
    dense_u, dense_x = u.contiguous(), x.contiguous()
    for op, given, dense in (
        (kernels.project_pair, single(u, u, x), single(dense_u, dense_u, dense_x)),
        (kernels.subspace_overlap, (single(u), single(u)), (single(dense_u), single(dense_u))),
        (kernels.small_svd, (u,), (dense_u,)),
        (kernels.panel_qr, single(x), single(dense_x)),
        (kernels.precise_product, (x.mT, x.mT), (dense_x.mT, dense_x.mT)),
    ):
        for one, other in zip(op(*given), op(*dense), strict=True):
            torch.testing.assert_close(one, other)


def test_inputs_are_not_changed(kernels):
    u, x = randn(2, 9, 4), randn(2, 3, 9)
    before, (thin, rows) = (u.clone(), x.clone()), single(u, x)
    kernels.project_pair(thin, thin, rows)
    assert torch.equal(thin, u.float()) and torch.equal(rows, x.float())
    kernels.subspace_overlap([thin], [thin])
    kernels.small_svd(u), kernels.panel_qr(rows)
    assert torch.equal(u, before[0]) and torch.equal(x, before[1])


def make_operands():
    """What each operator is checked with, in every form that it takes."""
    w, thin, scale = randn(2, 40, 48).half(), randn(2, 21, 130).float(), torch.ones(2).double()
    wide, narrow = [randn(2, 20, 7).float(), randn(1, 9, 70).float()], [randn(2, 20, 9).float()]
    u, x = randn(2, 9, 4), randn(2, 4, 6)
    yield "small_svd", u
    yield "small_svd", u.float()
    yield "small_singular_values", u
    yield "small_singular_values", u.float()
    yield "subspace_overlap", wide, [*narrow, randn(1, 9, 3).float()]
    yield "panel_qr", thin, None
    yield "panel_qr", thin, scale
    yield "project_pair", randn(2, 9, 4).float(), randn(2, 9, 3).float(), randn(2, 2, 9).float()
    yield "krylov_block", w, randn(2, 24, 40).float(), randn(2, 24, 24).float(), 16, 8
    yield "precise_product", x, randn(2, 3, 6).half()
    yield "precise_product", x, None


def test_every_operator_passes_torchs_own_checks():
    checked = set()
    for op, *operands in make_operands():
        torch.library.opcheck(getattr(torch.ops.prolora, op).default, tuple(operands))
        checked.add(op)
    assert checked == probe.CASES.keys()


def test_the_order_of_threads_changes_no_bit(monkeypatch):
    emulated = Kernels(load("emulated", "_emulated"), cuda=True)
    basis, panel = randn(1, 64, 72).float(), randn(2, 21, 130).float()
    us, ut, x = (randn(*shape).float() for shape in ((1, 588, 70), (1, 588, 8), (1, 2, 588)))
    for op, *operands in (
        ("krylov_block", randn(1, 72, 520).bfloat16(), basis, zeros(1, 64, 64), 32, 16),
        ("panel_qr", panel, None),
        ("project_pair", us, ut, x),
        ("small_svd", randn(2, 9, 4)),
        ("subspace_overlap", [us], [ut]),
    ):
        results = []
        for seed in "03":
            monkeypatch.setenv("EMU_SEED", seed)
            outputs = emulated.run(op, *operands)
            results.append([outputs] if op == "subspace_overlap" else outputs)
        for one, two in zip(*results, strict=True):
            assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0)), op


def test_shapes_without_data():
    with FakeTensorMode():
        u, x = torch.empty(5, 2, 9, 4), torch.empty(5, 2, 3, 9)
        assert [t.shape for t in project_pair(u, u, x)] == [(5, 2, 6, 9)] * 2
        (shared,) = subspace_overlap([u], [u])
        assert shared.shape == (5, 2) and shared.dtype == torch.float64
        left, s, v = small_svd(u)
        assert (left.shape, s.shape, v.shape) == (u.shape, (5, 2, 4), (5, 2, 4, 4))
        assert small_singular_values(u).shape == (5, 2, 4)
        q, lower, rank = panel_qr(x.float())
        assert (q.shape, lower.shape, rank.shape) == (x.shape, (5, 2, 3, 3), (5, 2))


def test_compiled_without_graph_breaks():
    def job(u, x):
        split, _ = project_pair(u, u, x)
        (shared,) = subspace_overlap([u], [u])
        return small_svd(split.mT)[1], shared

    compiled = torch.compile(job, fullgraph=True, backend="aot_eager", dynamic=True)
    u, x = randn(2, 9, 4), randn(2, 2, 9)
    torch.testing.assert_close(compiled(u, x), job(u, x))


def test_every_thread_count_gives_the_same():
    a, panel = randn(3, 50, 24), randn(3, 24, 120).float()
    before = torch.get_num_threads()
    for kernels in (Kernels(None), Kernels(load("cpu", "_C"))):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([*kernels.small_svd(a), *kernels.panel_qr(panel)])
        torch.set_num_threads(before)
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_kernels_without_a_device_raise_instead_of_crashing():
    extension = load("cpu", "_C")
    if extension.cuda_devices()[0]:
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError):
        run_small_svd(extension, randn(1, 3, 2), cuda=True)
    with pytest.raises(RuntimeError):
        run_panel_qr(extension, randn(1, 2, 3).float(), None, cuda=True)


REFUSED_INSIDE = [
    ("small_svd", [1, 2], False, False, "takes 8 addresses and sizes, not 2"),
    ("medium_svd", [], False, False, "no op medium_svd"),
    ("small_svd", [0] * 5 + [1, 2**24, 128], False, False, "entries"),
    ("small_singular_values", [0] * 3 + [1, 2**24, 128], False, False, "entries"),
    ("tridiagonalise", [0] * 5 + [1, 20000], False, False, "1 to 16384 columns"),
    ("tridiagonal_values", [0] * 6, False, False, "not in this precision"),
    ("tridiagonal_vectors", [0] * 9, False, False, "not in this precision"),
    ("precise_product", [0] * 12, True, False, "not in this precision"),
]


@pytest.mark.parametrize(("op", "numbers", "float64", "cuda", "words"), REFUSED_INSIDE)
def test_the_extension_refuses_what_its_kernels_do_not_take(op, numbers, float64, cuda, words):
    with pytest.raises((ValueError, RuntimeError), match=words):
        load("cpu", "_C").run(op, numbers, float64, cuda, 0)
