"""What the caller has set for his own arithmetic changes nothing here, and is as it was after."""

import multiprocessing
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
from diagonal import pair_up
from spectra import related, weights

import prolora
from prolora import LowRank, principal_angles, project, similarity, truncated_svd
from prolora.core import precision
from prolora.core.recompression import product_energies
from prolora.core.subspaces import angle_quantiles

# The Krylov solver, the Gram matrix in float32, and in float64.
SHAPES = {"krylov": (768, 768, 48), "gram-f32": (400, 420, 100), "gram-f64": (72, 96, 30)}


def make_case(shape):
    m, n, k = SHAPES[shape]
    source = weights(m, n, 0)
    generator = torch.Generator("cpu").manual_seed(1)
    up = torch.randn(m, 4, generator=generator, dtype=torch.float32)
    return source, related(source, 0.3, 1), LowRank(up, up[:4].mT.new_ones(4, n) / 9), k


CASES = {shape: make_case(shape) for shape in SHAPES}


def compute(shape):
    """Every public function, as one list of tensors."""
    source, target, delta, k = CASES[shape]
    bases = [truncated_svd(w, k) for w in (source, target)]
    alike = similarity(*bases, rank=k)
    results = [x for b in bases for x in (b.U, b.S, b.V, b.bound, b.energy)]
    results += [alike.left, alike.above_right, principal_angles(bases[0].U[:, :5], bases[1].U)]
    for method in ("prolora", "copy"):
        moved, info = project(delta, *bases, method=method, return_info=True)
        results += [moved.up, moved.down, info.copy_distance, info.norm_ratio]
    results.append(project(delta.dense(), source, target, rank=k))
    results += [delta.dense(), delta.norm(), *vars(delta.truncate(2)).values()]
    results.append(product_energies(delta.up, delta.down))
    stacks = [
        type(b)(**{n: v if n == "solvers" else v[None] for n, v in vars(b).items()}) for b in bases
    ]
    results += angle_quantiles(*stacks)
    return [x.detach().clone() for x in results]


@pytest.fixture(scope="module")
def expected():
    return {shape: compute(shape) for shape in SHAPES}


@contextmanager
def float32_products(mode):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        assert torch.get_float32_matmul_precision() == mode
        torch.set_float32_matmul_precision(before)


@contextmanager
def default(what, value, before):
    setting = getattr(torch, f"set_default_{what}")
    setting(value)
    try:
        yield
    finally:
        setting(before)


SETTINGS = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "float32 products high": lambda: float32_products("high"),
    "float32 products medium": lambda: float32_products("medium"),
    "default dtype float64": lambda: default("dtype", torch.float64, torch.float32),
    "default dtype bfloat16": lambda: default("dtype", torch.bfloat16, torch.float32),
    "default device meta": lambda: default("device", "meta", None),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "anomaly detection": torch.autograd.detect_anomaly,
}


@pytest.mark.parametrize(("setting", "shape"), pair_up(SETTINGS, SHAPES))
def test_no_setting_of_the_caller_changes_a_bit(setting, shape, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly detection announces itself
        with SETTINGS[setting]():
            found = compute(shape)
    for mine, plain in zip(found, expected[shape], strict=True):
        assert mine.dtype == plain.dtype and torch.equal(mine, plain)


def test_an_error_puts_the_settings_back():
    with float32_products("high"), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(prolora.errors.NonFiniteWeights):
            truncated_svd(torch.full((4, 4), torch.nan), 2)
        assert torch.is_autocast_enabled("cpu")


def test_the_precision_of_products_is_put_back_by_the_last_of_several_threads():
    inside, leave = threading.Barrier(4), threading.Barrier(4)

    def look(_):
        with precision.full_precision():
            inside.wait(20)
            mode = torch.get_float32_matmul_precision()
            leave.wait(20)
        return mode

    with float32_products("high"), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(look, range(4))) == ["highest"] * 4
    with float32_products("high"), precision.full_precision(), precision.full_precision():
        assert torch.get_float32_matmul_precision() == "highest"


def read_settings():
    """Every setting by its name, as torch gives it or refuses to."""
    backends = torch.backends
    values = {
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": backends.cudnn.allow_tf32,
    }
    for library in (backends.cuda, backends.cudnn, backends.mkldnn):
        for name in ("matmul", "conv", "rnn"):
            operation = getattr(library, name, None)
            if hasattr(operation, "fp32_precision"):
                values[f"{library.__name__}.{name}"] = operation.fp32_precision
    return values


@pytest.mark.parametrize("by_default", [True, False])
def test_convolutions_keep_24_bits_inside_and_are_as_they_were_outside(by_default):
    """torch's default is ten bits; old and new settings agree, or reading them would raise."""
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = by_default
        outside = read_settings()
        inside = precision.in_full_precision(read_settings)()
        assert (inside.pop("matmul"), inside.pop("cudnn")) == ("highest", False)
        assert set(inside.values()) <= {"ieee"}
        assert read_settings() == outside and outside["cudnn"] is by_default
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9")
def test_settings_that_contradict_each_other_are_pinned_and_put_back():
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    before = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        cudnn.allow_tf32, cudnn.conv.fp32_precision = True, "ieee"  # rnn is tf32
        torch.set_float32_matmul_precision("high")
        cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        with pytest.raises(RuntimeError):
            read_settings()
        with precision.full_precision():
            assert cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == "ieee"
            assert cuda.matmul.fp32_precision == "ieee"
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")
        assert cuda.matmul.fp32_precision == "tf32"
    finally:
        cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_threads_of_the_caller_get_the_same_bits(expected):
    with ThreadPoolExecutor(4) as pool:
        for shape, found in pool.map(lambda s: (s, compute(s)), [*SHAPES, *SHAPES]):
            for mine, plain in zip(found, expected[shape], strict=True):
                assert torch.equal(mine, plain)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a platform without fork")
@pytest.mark.parametrize("pinned", [False, True])
def test_a_forked_child_computes_the_same(pinned):
    """Also one forked while another thread of the parent holds the lock or pins the precision.

    It uses one thread, as the workers of torch's DataLoader do: OpenMP's threads, and so any larger
    product of torch itself, hang in a child whose parent has used them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        truncated_svd(CASES["gram-f32"][0], 20)  # starts every pool of threads there is
        source, target, delta, k = CASES["gram-f64"]
        # Not bit for bit: bits, and signs of singular vectors, go with the number of threads.
        wanted = project(delta.dense(), source, target, rank=k)

        def compare():
            torch.set_num_threads(1)
            moved = project(delta.dense(), source, target, rank=k)
            torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-5)

        child = multiprocessing.get_context("fork").Process(target=compare)
        with precision.full_precision() if pinned else nullcontext():
            held = precision._ARITHMETIC._lock if pinned else nullcontext()
            with held, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                child.start()
        child.join(60)
        child.kill()
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)


def test_the_callers_default_device_is_read_in_older_versions_of_torch_too(monkeypatch):
    monkeypatch.setattr(precision, "_KNOWS_DEFAULT_DEVICE", False)
    monkeypatch.setattr(torch, "get_default_device", lambda: pytest.fail("it overlooks contexts"))
    assert precision.read_default_device().type == "cpu"
    with torch.device("meta"):
        assert precision.read_default_device().type == "meta"
