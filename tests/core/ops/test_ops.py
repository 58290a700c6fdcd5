"""The ops as torch operators: errors, leading dimensions, layouts, compile, fakes, devices."""

import pytest
import torch
from backends import load
from torch._subclasses.fake_tensor import FakeTensorMode

from prolora import errors
from prolora.core.ops import probe
from prolora.core.ops.panel_qr import panel_qr, run_panel_qr
from prolora.core.ops.project_pair import project_pair
from prolora.core.ops.small_svd import run_small_svd, small_singular_values, small_svd
from prolora.core.ops.subspace_overlap import subspace_overlap

CALLS = {
    "subspace_overlap": lambda x: subspace_overlap([x], [x]),
    "panel_qr": panel_qr,
    "project_pair": lambda x: project_pair(x, x, x.mT if hasattr(x, "mT") else x),
    "small_singular_values": small_singular_values,
    "small_svd": small_svd,
}
every_op = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def randn(*shape, dtype=torch.float64, **options):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0), **options)


@every_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_other_dtypes_are_refused_by_name(call, dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        call(torch.zeros(2, 3, 2, dtype=dtype))


@pytest.mark.parametrize("op", [panel_qr, small_svd, small_singular_values])
def test_other_things_than_tensors_are_refused(op):
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, not list"):
        op([[1.0]])


def test_shapes_and_dtypes_must_agree():
    with pytest.raises(errors.ShapeMismatch, match=r"\(2, 5, 3\).*\(2, 4, 3\)"):
        subspace_overlap([torch.zeros(2, 5, 3)], [torch.zeros(2, 4, 3)])
    with pytest.raises(errors.ShapeMismatch):
        subspace_overlap([torch.zeros(2, 5, 3)], [torch.zeros(1, 5, 3)])
    with pytest.raises(TypeError, match=r"float32.*float64"):
        subspace_overlap([torch.zeros(2, 5, 3)], [torch.zeros(2, 5, 3).double()])


@pytest.mark.parametrize("op", [small_svd, small_singular_values])
@pytest.mark.parametrize("shape", [(3, 4), (1000, 129)])
def test_small_svd_refuses_wide_and_large_matrices(op, shape):
    with pytest.raises(ValueError, match=r"use torch\.linalg\.svd"):
        op(torch.zeros(shape))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
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
    w, thin, scale = randn(2, 40, 48).half(), randn(2, 3, 9).float(), torch.ones(2).double()
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
    yield "precise_product", x


def test_every_operator_passes_torchs_own_checks():
    checked = set()
    for op, *operands in make_operands():
        torch.library.opcheck(getattr(torch.ops.prolora, op).default, tuple(operands))
        checked.add(op)
    assert checked == probe.CASES.keys()


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
        q, lower, _ = panel_qr(x.float())
        (shared,) = subspace_overlap([u], [q.mT.double()])
        return small_svd(split.mT)[1], shared, lower @ q

    compiled = torch.compile(job, fullgraph=True, backend="aot_eager", dynamic=True)
    u, x = randn(2, 9, 4), randn(2, 2, 9)
    torch.testing.assert_close(compiled(u, x), job(u, x))


def test_every_thread_count_gives_the_same(kernels):
    a, panel = randn(3, 50, 24), randn(3, 24, 120).float()
    before = torch.get_num_threads()
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


def test_a_wrong_number_of_arguments_is_refused():
    extension = load("cpu", "_C")
    with pytest.raises(ValueError, match="takes 8 addresses and sizes, not 2"):
        extension.run("small_svd", [1, 2], False, False, 0)
    with pytest.raises(ValueError, match="no op medium_svd"):
        extension.run("medium_svd", [], False, False, 0)
