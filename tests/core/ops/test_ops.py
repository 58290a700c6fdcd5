"""The ops as torch operators: errors, leading dimensions, layouts, gradients, compile, fakes."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prolora import errors
from prolora.core.ops import operators

CALLS = {
    "split_project": lambda x: operators.split_project(x, x),
    "overlap": lambda x: operators.overlap(x, x),
    "small_svd": operators.small_svd,
}
every_op = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def randn(*shape, dtype=torch.float64, **options):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0), **options)


@every_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_other_dtypes_are_refused_by_name(call, dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        call(torch.zeros(2, 3, 2, dtype=dtype))


@every_op
def test_other_things_than_tensors_are_refused(call):
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, not list"):
        call([[1.0]])


@every_op
def test_vectors_are_refused(call):
    with pytest.raises(errors.ShapeMismatch, match="two or more dimensions"):
        call(torch.zeros(3))


@pytest.mark.parametrize("op", [operators.split_project, operators.overlap])
def test_shapes_and_dtypes_must_agree(op):
    with pytest.raises(errors.ShapeMismatch, match=r"\(2, 5, 3\).*\(2, 4, 3\)"):
        op(torch.zeros(2, 5, 3), torch.zeros(2, 4, 3))
    with pytest.raises(errors.ShapeMismatch):
        op(torch.zeros(2, 5, 3), torch.zeros(1, 5, 3))
    with pytest.raises(TypeError, match=r"float32.*float64"):
        op(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3).double())


@pytest.mark.parametrize("shape", [(3, 4), (1000, 129)])
def test_small_svd_refuses_wide_and_large_matrices(shape):
    with pytest.raises(ValueError, match=r"use torch\.linalg\.svd"):
        operators.small_svd(torch.zeros(shape))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions_are_kept(lead):
    u, x = randn(*lead, 9, 4), randn(*lead, 9, 2)
    par, perp = operators.split_project(u, x)
    torch.testing.assert_close(par, u @ (u.mT @ x))
    torch.testing.assert_close(perp, x - par)
    shared = operators.overlap(u, x)
    torch.testing.assert_close(shared, (u.mT @ x).square().sum((-2, -1)))
    left, s, v = operators.small_svd(u)
    assert (left.shape, s.shape, v.shape) == (u.shape, (*lead, 4), (*lead, 4, 4))
    torch.testing.assert_close((left * s[..., None, :]) @ v.mT, u)


def test_layout_in_memory_does_not_matter():
    u, x = randn(2, 4, 9).mT, randn(2, 18, 3)[:, ::2]
    assert not u.is_contiguous() and not x.is_contiguous()
    dense_u, dense_x = u.contiguous(), x.contiguous()
    assert torch.equal(
        operators.split_project(u, x)[0], operators.split_project(dense_u, dense_x)[0]
    )
    assert torch.equal(operators.overlap(u, x), operators.overlap(dense_u, dense_x))
    assert torch.equal(operators.small_svd(u)[1], operators.small_svd(dense_u)[1])


def test_inputs_are_not_changed():
    u, x = randn(2, 9, 4), randn(2, 9, 3)
    before = u.clone(), x.clone()
    operators.split_project(u, x), operators.overlap(u, x), operators.small_svd(u)
    assert torch.equal(u, before[0]) and torch.equal(x, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operators_pass_torchs_own_checks(dtype):
    u = randn(2, 9, 4, dtype=dtype, requires_grad=True)
    x = randn(2, 9, 3, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.prolora.split_project.default, (u, x))
    torch.library.opcheck(torch.ops.prolora.overlap.default, (u, x))
    torch.library.opcheck(torch.ops.prolora.small_svd.default, (u.detach(),))


@pytest.mark.parametrize("op", [operators.split_project, operators.overlap])
def test_gradients_are_right(op):
    u = randn(2, 6, 3, requires_grad=True)
    x = randn(2, 6, 2, requires_grad=True)
    assert torch.autograd.gradcheck(op, (u, x))
    assert torch.autograd.gradgradcheck(op, (u, x))


def test_shapes_without_data():
    with FakeTensorMode():
        u, x = torch.empty(5, 2, 9, 4), torch.empty(5, 2, 9, 3)
        assert [t.shape for t in operators.split_project(u, x)] == [x.shape] * 2
        shared = operators.overlap(u, x)
        assert shared.shape == (5, 2) and shared.dtype == torch.float64
        left, s, v = operators.small_svd(u)
        assert (left.shape, s.shape, v.shape) == (u.shape, (5, 2, 4), (5, 2, 4, 4))


def test_compiled_without_graph_breaks():
    def job(u, x):
        par, perp = operators.split_project(u, x)
        _, s, _ = operators.small_svd(par)
        return s, operators.overlap(u, perp)

    compiled = torch.compile(job, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 9, 4), (3, 5, 2)):
        u, x = randn(*shape), randn(shape[0], shape[1], 2)
        torch.testing.assert_close(compiled(u, x), job(u, x))


def test_every_thread_count_gives_the_same():
    u, x = randn(5, 200, 90), randn(5, 200, 40)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(operators.run_split_project(operators._C, u, x, False)[0])
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_no_gpu_says_why():
    count, why = operators.cuda_status()
    if count:
        pytest.skip("there is a GPU")
    assert why
    with pytest.raises(RuntimeError, match="no usable CUDA device"):
        operators.require_cuda()
    with pytest.raises(RuntimeError, match="no usable CUDA device"):
        operators.require("cuda:0")
    operators.require("cpu")


def test_kernels_without_a_device_raise_instead_of_crashing():
    if operators.cuda_status()[0]:
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError):
        operators.run_split_project(operators._C, randn(1, 3, 2), randn(1, 3, 1), cuda=True)


def test_importing_the_ops_alone_works():
    heavy = "{'diffusers', 'peft', 'cupy'}"
    code = f"import prolora.core.ops.operators, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
