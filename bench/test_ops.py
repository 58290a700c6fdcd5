"""The native ops, each against its torch baseline in the same run.

    pytest bench/test_ops.py                    # tables of times
    pytest bench/test_ops.py --benchmark-disable  # once each, as a test

`extra_info["speedup"]` of an op is the baseline's time over its own, taken in alternation in the
same test; results are compared before they are timed.
"""

import statistics

import pytest
import torch
from timing import seconds

from prolora.core.ops import native
from prolora.core.ops.krylov_block import extend_block, krylov_block, run_krylov_block
from prolora.core.ops.panel_qr import panel_qr, run_panel_qr
from prolora.core.ops.precise_product import measured_product, multiply_wide, run_precise_product
from prolora.core.ops.project_pair import project_pair, run_project_pair
from prolora.core.ops.small_svd import run_small_svd, small_svd
from prolora.core.ops.subspace_overlap import subspace_overlap

DTYPES = [torch.float32, torch.float64]
ROUNDS = 7


def torch_svd(a):
    """One matrix after the other."""
    return torch.linalg.svd(a, full_matrices=False)


def compare(benchmark, ours, baseline, args):
    """Times `ours` by pytest-benchmark, and both in alternation for the ratio."""
    benchmark.extra_info["baseline"] = baseline.__doc__
    benchmark.extra_info["device"] = (
        torch.cuda.get_device_name() if args[0].is_cuda else f"{torch.get_num_threads()} threads"
    )
    benchmark.extra_info["extension"] = native.EXTENSION.why or "compiled"

    def timed():
        ours(*args)
        if args[0].is_cuda:
            torch.cuda.synchronize()

    if benchmark.enabled:
        seconds(ours, args), seconds(baseline, args)
        pairs = [(seconds(ours, args), seconds(baseline, args)) for _ in range(ROUNDS)]
        mine, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        benchmark.extra_info["ours_ms"] = round(1e3 * mine, 4)
        benchmark.extra_info["baseline_ms"] = round(1e3 * theirs, 4)
        benchmark.extra_info["speedup"] = round(theirs / mine, 3)
    benchmark(timed)


def choose_path(path, op, run_kernel):
    """What a user gets ("op"), or the compiled code whatever the size ("kernel")."""
    if path == "op":
        return op
    if native.EXTENSION.kernels is None:
        pytest.skip(f"no compiled extension: {native.EXTENSION.why}")
    return lambda *operands: run_kernel(native.EXTENSION.kernels, *operands, operands[0].is_cuda)


def random(shape, dtype, device):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return x.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("path", ["op", "kernel"])
def test_small_svd(benchmark, device, path, n, dtype):
    """path: what a user gets, which may be torch itself, or the kernel whatever the size."""
    batch = {64: 512, 128: 256}.get(n, 2048 // n) if path == "op" else 2048 // n
    a = random((batch if benchmark.enabled else 4, n, n), dtype, device)
    kernel = choose_path(path, small_svd, run_small_svd)
    largest = 10 * n**0.5
    tolerance = n * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(kernel(a)[1], torch_svd(a)[1], rtol=0, atol=tolerance)
    compare(benchmark, kernel, torch_svd, (a,))


def torch_overlap_loop(*bases):
    """Layer by layer: the product, its squares, their sum."""
    half = len(bases) // 2
    pairs = zip(bases[:half], bases[half:], strict=True)
    return [(x.mT @ y).square().sum() for x, y in pairs]


@pytest.mark.parametrize("k", [128, 320])
def test_subspace_overlap(benchmark, device, k):
    """All pairs of a model in one call, against one after the other."""
    m, count = (1280, 120) if benchmark.enabled else (640, 2)
    us = torch.linalg.qr(random((count, m, k), torch.float32, device))[0]
    bases = [x.contiguous() for x in (*us, *us.flip(0).roll(1, 1))]

    def overlap(*bases):
        return subspace_overlap(bases[:count], bases[count:])

    sums = zip(overlap(*bases), torch_overlap_loop(*bases), strict=True)
    assert all(abs(float(one) - float(other)) < 1e-5 * k for one, other in sums)
    compare(benchmark, overlap, torch_overlap_loop, bases)


def torch_project_pair(us, ut, x):
    """Four projections by torch.bmm, a factor's range and complement one after the other."""
    inside = us @ (us.mT @ x.mT)
    outside = x.mT - inside
    rest = outside - ut @ (ut.mT @ outside)
    return ut @ (ut.mT @ inside), rest


@pytest.mark.parametrize(
    "shape",
    [(16, 640, 294, 32), (8, 1280, 588, 32), (8, 1280, 128, 32), (2, 10240, 588, 32)],
    ids=str,
)
@pytest.mark.parametrize("path", ["op", "kernel"])
def test_project_pair(benchmark, device, path, shape):
    """path: as in test_small_svd."""
    b, m, k, r = shape if benchmark.enabled else (1, 1280, *shape[2:])
    us = torch.linalg.qr(random((b, m, k), torch.float32, device))[0].contiguous()
    ut = us.flip(0).roll(1, 1).contiguous()
    x = random((b, r, m), torch.float32, device)
    kernel = choose_path(path, project_pair, run_project_pair)
    moved = torch.cat(torch_project_pair(us, ut, x), 2).mT
    torch.testing.assert_close(kernel(us, ut, x)[1], moved, rtol=1e-4, atol=1e-4)
    compare(benchmark, kernel, torch_project_pair, (us, ut, x))


def torch_qr(panel):
    """Householder reflections."""
    return torch.linalg.qr(panel.mT)


@pytest.mark.parametrize(
    "shape", [(32, 16, 1280), (32, 32, 1280), (32, 64, 1280), (4, 32, 10240)], ids=str
)
@pytest.mark.parametrize("path", ["op", "kernel"])
def test_panel_qr(benchmark, device, path, shape):
    """path: as in test_small_svd."""
    panel = random(shape, torch.float32, device)
    kernel = choose_path(path, panel_qr, lambda *given: run_panel_qr(*given[:2], None, given[2]))
    q, lower, _ = kernel(panel)
    torch.testing.assert_close(lower @ q, panel, rtol=0, atol=1e-4)
    compare(benchmark, kernel, torch_qr, (panel,))


@pytest.mark.parametrize("path", ["op", "kernel"])
def test_precise_product(benchmark, device, path):
    """path: as in test_small_svd; a CPU's kernel is the oracle of a GPU's, and slow."""
    whole = benchmark.enabled and (path == "op" or device == "cuda")
    w = random((4, 1280, 1280) if whole else (1, 96, 128), torch.bfloat16, device)
    kernel = choose_path(
        path, measured_product, lambda *given: run_precise_product(*given[:2], None, given[2])
    )
    torch.testing.assert_close(kernel(w)[0], multiply_wide(w)[0], rtol=0, atol=1e-9)
    compare(benchmark, kernel, multiply_wide, (w,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 1280, 1280), (2, 3072, 3072)], ids=str)
@pytest.mark.parametrize("path", ["op", "kernel"])
def test_krylov_block(benchmark, device, path, shape, dtype):
    """path: as in test_small_svd; the baseline has a float32 copy of the weights."""
    b, d, n = shape if benchmark.enabled else (1, 96, 128)
    size, width = (256, 32) if benchmark.enabled else (16, 8)
    w = random((b, d, n), dtype, device) / n**0.5
    single = w.float()
    kept = torch.linalg.qr(random((b, d, size), torch.float32, device))[0].mT
    rows = torch.cat([kept, kept[:, :width]], 1).contiguous()
    projected = torch.zeros(b, size + width, size + width, device=device)

    def torch_krylov_block(w, rows, projected, size, width):
        """Products of float32, Gram-Schmidt twice, panel_qr."""
        return extend_block(single, rows, projected, size, width)

    def ours(w, rows, projected, size, width):
        if path == "op":
            return krylov_block(w, rows, projected, size, width)
        if native.EXTENSION.kernels is None:
            pytest.skip(f"no compiled extension: {native.EXTENSION.why}")
        kernels = native.EXTENSION.kernels
        return run_krylov_block(kernels, w, rows, projected, size, width, w.is_cuda)

    operands = (w, rows, projected, size, width)
    other = torch_krylov_block(*operands), rows.clone(), projected.clone()
    for one, two in zip((ours(*operands), rows, projected), other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    compare(benchmark, ours, torch_krylov_block, operands)
