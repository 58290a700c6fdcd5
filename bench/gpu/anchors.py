"""Call 2: what the card and its libraries can do, by which everything else is judged.

The baselines that take seconds a matrix run on two matrices, and are scaled to the stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from .clock import time_call
from .correct import list_further_steps
from .steps import Bench, Step, make_weights

FEW = 2


def list_steps(bench: Bench) -> Iterator[Step]:
    """Further comparisons, bandwidth and products, then the libraries' factorisations."""
    yield from list_further_steps()
    yield Step("bandwidth", 15, time_copy)
    yield Step("launch", 10, time_launches)
    for precision in ("highest", "high"):
        yield Step(f"products {precision}", 20, partial(time_products, precision=precision))
    yield Step("products float64", 15, partial(time_products, precision="float64"))
    for batch, m, n in ((64, 640, 640), (64, 1280, 1280), (8, 3072, 3072), (16, 10240, 1280)):
        yield Step(f"svd {m}x{n}", 45, partial(time_svd, batch=batch, m=m, n=n))
    yield Step("svd_lowrank", 20, time_lowrank)


def time_copy(bench: Bench) -> None:
    """GB/s read and written by a copy of 1 GiB."""
    x = torch.zeros(bench.size(1 << 15), bench.size(1 << 13), device=bench.device)
    y = torch.empty_like(x)
    ms, repeats = time_call(lambda: y.copy_(x), bench.device)
    bench.record("copy", 2 * x.numel() * 4 / ms / 1e6, "GB/s", "float32", repeats=repeats)


def time_launches(bench: Bench) -> None:
    """Microseconds of one small operator in a row of a thousand."""
    x = torch.zeros(8, device=bench.device)

    def many() -> None:
        for _ in range(1000):
            x.add_(1)

    ms, repeats = time_call(many, bench.device, repeats=5)
    bench.record("launch", ms, "µs", "add_ of 8 numbers", repeats=repeats)


def time_products(bench: Bench, precision: str) -> None:
    """TFLOP/s of [64, 1280, 1280] times N columns."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    try:
        b, d = bench.batch(64), bench.size(1280)
        w = torch.ones(b, d, d, device=bench.device, dtype=dtype)
        for columns in (32, 64, 128, 1280):
            y = torch.ones(b, d, bench.size(columns), device=bench.device, dtype=dtype)
            ms, repeats = time_call(partial(torch.bmm, w, y), bench.device, limit=3)
            flops = 2 * b * d * d * y.shape[-1]
            case = f"[64, 1280, 1280] x {columns}, {precision}"
            bench.record("bmm", flops / ms / 1e9, "TFLOP/s", case, repeats=repeats)
    finally:
        torch.set_float32_matmul_precision(before)


def time_svd(bench: Bench, batch: int, m: int, n: int) -> None:
    """torch.linalg.svd, the baseline of truncated_svd."""
    w = make_weights(FEW, bench.size(m), bench.size(n), bench.device)
    ms, repeats = time_call(
        lambda: torch.linalg.svd(w, full_matrices=False), bench.device, repeats=3, limit=25
    )
    scale = batch / FEW
    case = f"{batch} x {m}x{n}"
    bench.record("torch.linalg.svd", ms * scale, "ms", case, repeats=repeats, scaled=scale)


def time_lowrank(bench: Bench) -> None:
    """Fast, and wrong on these spectra (docs/performance.md)."""
    w = make_weights(bench.batch(64), bench.size(1280), bench.size(1280), bench.device)
    job = partial(torch.svd_lowrank, w, q=bench.size(136), niter=4)
    ms, repeats = time_call(job, bench.device, repeats=5)
    bench.record("torch.svd_lowrank", ms, "ms", "64 x 1280x1280, q=136, niter=4", repeats=repeats)
