"""Call 2: what the card and its libraries can do, by which everything else is judged.

The baselines that take seconds a matrix run on two matrices, and are scaled to the stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from prolora.core.svd import solvers

from .clock import time_call
from .steps import Bench, Step, make_weights

FEW = 2
EIGENPROBLEMS = (32, 128, 416, 544, 1280)
# Stacks that fit the L2 cache at 1280² (6 on an H100, 8 on a 4090), and those that do not.
BATCHES = (1, 4, 6, 8, 16, 64, 277)
MOST_BATCH = 64
"""Matrices of 1280² beyond which a card needs 40 GB: a solver holds six copies of a stack."""
TOO_LONG = 2e3
"""Milliseconds of a call after which no larger stack is tried."""


def list_steps(bench: Bench) -> Iterator[Step]:
    """Eigensolvers, bandwidth and products, then the libraries' factorisations."""
    for size in EIGENPROBLEMS:
        yield Step(f"eigh {size}", 60 if size == 1280 else 12, partial(time_eigh, d=size))
    yield Step("bandwidth", 15, time_copy)
    yield Step("launch", 10, time_launches)
    for precision in ("highest", "high"):
        yield Step(f"products {precision}", 20, partial(time_products, precision=precision))
    yield Step("products float64", 15, partial(time_products, precision="float64"))
    for batch, m, n in ((64, 1280, 1280), (8, 3072, 3072)):
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


def time_eigh(bench: Bench, d: int) -> None:
    """Stacks of several sizes: XsyevBatched from torch 2.12 on, and with prolora's checks."""
    solving = {
        "descending_eigh": solvers.descending_eigh,
        "torch.linalg.eigh": torch.linalg.eigh,
        "torch.linalg.eigvalsh": torch.linalg.eigvalsh,
    }
    for dtype in (torch.float32, torch.float64):
        w = make_weights(1, bench.size(d), bench.size(d), bench.device).to(dtype)
        for name, solve in solving.items():
            for batch in sorted({bench.batch(b) for b in list_batches(bench, d)}):
                case = f"{batch} x {d}², {str(dtype).removeprefix('torch.')}"
                try:
                    stack = (w @ w.mT).repeat(batch, 1, 1)
                    ms, repeats = time_call(partial(solve, stack), bench.device, 5, limit=0.3)
                except torch.cuda.OutOfMemoryError as error:
                    bench.record(name, None, "ms", case, error=f"out of memory: {error}"[:100])
                    break
                bench.record(name, ms, "ms", case, repeats=repeats)
                if ms > TOO_LONG:
                    break


def list_batches(bench: Bench, d: int) -> list[int]:
    """The largest stack of large matrices only on a card with 40 GB."""
    large = bench.device == "cuda" and torch.cuda.mem_get_info()[1] >= 40 << 30
    return [b for b in BATCHES if b <= MOST_BATCH or d < 1280 or large]
