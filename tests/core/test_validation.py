"""Which arrays, tensors and devices are taken; all others are refused by name, before any work."""

import types

import numpy as np
import pytest
import torch
from exchanged import Exchanged
from spectra import related, weights

import prolora
from prolora import LowRank, ProLoRAError, principal_angles, project, similarity, truncated_svd
from prolora.core.validation import check_device, check_operand
from prolora.errors import SolverFailure, UnsupportedDevice, UnsupportedTensor
from prolora.making.extract_options import ExtractOptions
from prolora.verbs.option_keywords import resolve_options


def case(m=9, n=7):
    source = weights(m, n, 0).double()
    target = related(source, 0.3, 1)
    delta = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return delta, source, target


# --- numpy arrays whose memory DLPack cannot describe.

ODD = {
    "upside down": lambda a: np.flipud(a.copy())[::1],
    "mirrored": lambda a: a[:, ::-1],
    "backwards": lambda a: a[::-1, ::-1],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "little-endian": lambda a: a.astype(a.dtype.newbyteorder("<")),
    "read-only": lambda a: np.broadcast_to(a, a.shape),
    "Fortran order": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
}


@pytest.mark.parametrize("kind", ODD)
def test_numpy_arrays_of_any_layout_give_what_plain_ones_give(kind):
    odd = [ODD[kind](x.numpy()) for x in case()]
    plain = [np.ascontiguousarray(x).astype(np.float64) for x in odd]
    before = [x.copy() for x in odd]
    found, wanted = project(*odd, rank=3), project(*plain, rank=3)
    assert isinstance(found, np.ndarray) and found.dtype == np.float64 and found.dtype.isnative
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    np.testing.assert_allclose(principal_angles(*odd[:2]), principal_angles(*plain[:2]), atol=1e-12)
    for array, copy in zip(odd, before, strict=True):
        np.testing.assert_array_equal(array, copy)


# --- Tensors of a kind that cannot be computed with.

KINDS = {
    "complex": lambda x: x.to(torch.complex128),
    "on the meta device": lambda x: x.to("meta"),
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "a nested tensor": lambda x: torch.nested.nested_tensor([x, x]),
    "a nested tensor, jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
}


OF_NO_FACTOR = {"complex", "sparse_coo", "a nested tensor"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_another_kind_is_refused_by_name(kind):
    delta, source, target = case()
    words = kind.split(",")[0]
    bad = KINDS[kind](source)
    for call, name in (
        (lambda: project(bad, source, target), "delta"),
        (lambda: project(delta, bad, target), "W_src"),
        (lambda: project(delta, source, bad), "W_tgt"),
        (lambda: project((bad, delta.mT), source, target), ""),
        (lambda: truncated_svd(bad, 3), "W"),
        (lambda: similarity(bad, target, rank=3), "W_src"),
        (lambda: similarity(source, bad, rank=3), "W_tgt"),
        (lambda: principal_angles(bad, target), "X"),
        (lambda: principal_angles(source, bad), "Y"),
        *([(lambda: LowRank(source, bad), "down")] if kind in OF_NO_FACTOR else []),
    ):
        with pytest.raises(UnsupportedTensor, match=f"{name}.* is .*{words}") as error:
            call()
        assert isinstance(error.value, ProLoRAError | TypeError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch can use a GPU")
def test_an_array_on_a_gpu_that_torch_cannot_use_is_refused_by_name():
    memory = {"shape": (3, 4), "typestr": "<f4", "data": (1 << 32, False), "version": 3}
    array = type("Array", (), {"__cuda_array_interface__": memory})()
    with pytest.raises(UnsupportedTensor, match="W, Array of unknown dtype, cannot become"):
        truncated_svd(array, 2)


def test_no_function_that_looks_at_numbers_runs_under_vmap():
    """And says so itself, with the way out."""
    delta, source, target = (torch.stack([x, x]) for x in case())
    for call, name in (
        (lambda w: project(w, source[0], target[0], rank=3), "project"),
        (lambda w: project(delta[0], w, target[0], rank=3), "project"),
        (lambda w: truncated_svd(w, 3).S, "truncated_svd"),
        (lambda w: similarity(w, target[0], rank=3).left, "similarity"),
        (lambda w: principal_angles(w, target[0]), "principal_angles"),
    ):
        words = rf"{name} cannot run under torch.func.vmap.*stacks.*\[b, m, n\]"
        with pytest.raises(UnsupportedTensor, match=words):
            torch.func.vmap(call)(source)
    assert project(delta, source, target, rank=3).shape == delta.shape


# --- Numbers of numpy.


@pytest.mark.parametrize("rank", [np.uint8(3), np.float32(0.5)])
def test_a_number_of_numpy_is_a_rank(rank):
    delta, source, target = case()
    for compute in (
        lambda rank: project(delta, source, target, rank=rank),
        lambda rank: truncated_svd(source, rank).U,
        lambda rank: similarity(source, target, rank=rank).left,
    ):
        assert torch.equal(compute(rank), compute(rank.item()))


# --- Solvers.


def test_an_svd_behind_angles_that_fails_is_an_error_of_prolora(monkeypatch):
    _, source, target = case()

    def fail(matrix):
        raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svdvals", fail)
    with pytest.raises(SolverFailure, match="principal angles of X and Y did not converge"):
        principal_angles(source, target)


# --- Devices.


def test_a_device_that_prolora_does_not_compute_on_is_refused_before_anything_is_read(
    tmp_path, monkeypatch
):
    missing = tmp_path / "lora.safetensors"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = {"foo": "no device is called 'foo'", "mps": "no float64", "meta": "type meta"}
    for device, words in (refused | {7.5: "7.5", "cuda": "no usable CUDA device"}).items():
        with pytest.raises(UnsupportedDevice, match=words) as error:
            prolora.transfer(missing, missing, missing, device=device)
        assert isinstance(error.value, ProLoRAError) and isinstance(error.value, RuntimeError)
        with pytest.raises(UnsupportedDevice, match=words):
            prolora.transfer_many([missing], missing, missing, missing, device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert check_device("cuda:0").index == 0
    with pytest.raises(UnsupportedDevice, match="has 1 CUDA"):
        check_device("cuda:1")


def test_a_tensor_on_a_device_of_another_kind_is_refused_by_name(monkeypatch):
    def refuse(device):
        raise RuntimeError("device mps has no float64")

    monkeypatch.setattr("prolora.core.ops.native.require_device", refuse)
    with pytest.raises(UnsupportedDevice, match="W is on cpu: device mps has no float64"):
        check_operand("W", torch.ones(2, 2))


@pytest.mark.parametrize("kind", [prolora.TransferOptions, prolora.FitOptions, ExtractOptions])
def test_a_job_computes_on_a_gpu_where_there_is_one(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_options(kind(), {}).device == "cuda"
    assert resolve_options(kind(), {"device": "cpu"}).device == "cpu"
    assert resolve_options(kind(device=torch.device("cuda", 0)), {}).device == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_options(kind(), {}).device == "cpu"


# --- Derivatives: right, or refused.


@pytest.mark.parametrize("method", ["prolora", "copy"])
@pytest.mark.parametrize("dense", [False, True])
def test_the_forward_derivative_is_that_of_differences(method, dense):
    delta, source, target = case(12, 10)
    up, down = delta[:, :3].clone(), delta[:3].clone()
    options = {"method": method, "rank": 4}

    def moved(up, down):
        if dense:
            return project(up @ down, source, target, **options)
        return project((up, down), source, target, **options).dense()

    generator = torch.Generator().manual_seed(3)
    tangents = tuple(torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in (up, down))
    _, found = torch.func.jvp(moved, (up, down), tangents)
    h = 1e-6
    ahead, behind = (moved(up + s * tangents[0], down + s * tangents[1]) for s in (h, -h))
    torch.testing.assert_close(found, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)
    assert found.norm() > 1e-3
    # Reverse mode agrees: ⟨g, Jt⟩ = ⟨Jᵀg, t⟩.
    g = torch.randn(found.shape, dtype=found.dtype, generator=generator)
    _, pull = torch.func.vjp(moved, up, down)
    back = sum((x * t).sum() for x, t in zip(pull(g), tangents, strict=True))
    torch.testing.assert_close((g * found).sum(), back)


def test_second_derivatives_are_right():
    delta, source, target = case(8, 6)
    bases = [truncated_svd(w, 3) for w in (source, target)]
    up = delta[:, :2].clone().requires_grad_()
    down = torch.randn(2, 6, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda u: project((u, down), *bases).dense().square().sum(), (up,)
    )


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_by_a_weight_is_refused_instead_of_absent(which):
    delta, *bases = case()
    delta.requires_grad_()
    name = ("W_src", "W_tgt")[which]
    pair = [w.clone().requires_grad_() * 1 if i == which else w for i, w in enumerate(bases)]
    with pytest.raises(NotImplementedError, match=rf"no gradient.*{name}.detach\(\)"):
        project(delta, *pair, rank=3)
    with pytest.raises(NotImplementedError, match=name):
        torch.func.grad(lambda w: project(delta, *pair[:which], w, *pair[which + 1 :]).sum())(
            bases[which]
        )
    with torch.no_grad():
        plain = project(delta, *pair, rank=3)
    assert torch.equal(plain, project(delta, *(w.detach() for w in pair), rank=3))


def test_a_weight_of_a_module_is_taken_detached():
    delta, source, target = case()
    delta.requires_grad_()
    leaves = [torch.nn.Parameter(w) for w in (source, target)]
    moved = project(delta, *leaves, rank=3)
    assert torch.equal(moved, project(delta, source, target, rank=3))
    moved.square().sum().backward()
    assert delta.grad.norm() > 0 and all(leaf.grad is None for leaf in leaves)
    assert not truncated_svd(leaves[0], 3).U.requires_grad


def test_a_library_that_takes_no_array_gives_a_tensor_and_the_log_says_so(monkeypatch, caplog):
    delta, source, target = case()
    space = types.SimpleNamespace(__name__="strange")
    monkeypatch.setattr(Exchanged, "__array_namespace__", lambda self: space, raising=False)
    found = project(*map(Exchanged, (delta, source, target)), rank=3)
    assert torch.equal(found, project(delta, source, target, rank=3))
    assert "strange: 'types.SimpleNamespace' object has no attribute 'from_dlpack'" in caplog.text


def test_the_derivative_of_what_has_none_is_refused_instead_of_zero():
    delta, source, _ = case()
    for function in (
        lambda w: truncated_svd(w, 3).S,
        lambda w: LowRank(w, source.mT).truncate(2).dense(),
    ):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (source,), (delta,))
