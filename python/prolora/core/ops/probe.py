"""The kernels of every op, run once and small: what a child process does before the first trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .krylov_block import run_krylov_block
from .native import EXTENSION
from .panel_qr import run_panel_qr
from .precise_product import run_precise_product
from .project_pair import run_project_pair
from .small_svd import run_small_singular_values, run_small_svd
from .subspace_overlap import run_subspace_overlap


def run_child(device: str, *names: str) -> None:
    """Runs the kernels of the ops not known yet; prints BEGIN and END of each.

    END is followed by the reason where an op fails. A lost GPU ends the process.
    """
    for op in CASES.keys() - set(names):
        print("BEGIN", op, flush=True)
        why = ""
        try:
            run_op(op, device)
        except RuntimeError as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)  # raises what lasts
        print("END", op, why, flush=True)


def run_op(op: str, device: str, large: bool = False) -> None:
    """Runs the kernels of an op on its cases, and waits for the device."""
    assert EXTENSION.kernels is not None
    cuda = device.startswith("cuda")
    for run, *operands in CASES[op](large, device):
        run(EXTENSION.kernels, *operands, cuda)
    if cuda:
        torch.cuda.synchronize(device)


def random(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Generates normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def make_basis(b: int, d: int, size: int, room: int, device: str) -> tuple[Tensor, Tensor]:
    """Makes `size` orthonormal rows in [b, room, d], and room for their projection.

    On the CPU: on a card cuSOLVER's kernels would be the first that a tool sees.
    """
    rows = torch.zeros(b, room, d)
    rows[:, :size] = torch.linalg.qr(random((b, d, size), "cpu"))[0].mT
    return rows.to(device), torch.zeros(b, room, room, device=device)


Case = tuple[Any, ...]
"""A function that runs a kernel, and its operands between the extension and `cuda`."""


def matrices(run: Any, large: bool, device: str) -> Iterator[Case]:
    """Yields sizes for 48 KiB of shared memory, for more, and for global scratch."""
    for m, n in [(64, 64), (128, 128), (512, 128)] if large else [(9, 7), (80, 80), (300, 100)]:
        yield run, random((64 if large else 2, m, n), device)


def panels(large: bool, device: str) -> Iterator[Case]:
    """Yields panels of three widths: the widest is in global memory on cards for games."""
    for rows in (32, 64, 128):
        shape = (64, rows, 1280) if large else (2, rows, 160)
        yield run_panel_qr, random(shape, device), None


def blocks(large: bool, device: str) -> Iterator[Case]:
    """Yields both dtypes and layouts; few matrices, with products in parts; cut tiles."""
    small = [(2, 96, 128, 32, 16), (1, 101, 1031, 21, 7)]
    for b, d, n, size, width in [(64, 1280, 1280, 256, 32)] if large else small:
        rows, projected = make_basis(b, d, size, size + width, device)
        for dtype in (torch.float16, torch.bfloat16):
            w = random((b, d, n), device, dtype)
            for one in (w, w.mT.contiguous().mT):
                yield run_krylov_block, one, rows, projected, size, width


def overlaps(large: bool, device: str) -> Iterator[Case]:
    """Yields rows for copies of 16 bytes, and rows for smaller ones."""
    for shape in [(64, 1280, 128)] if large else [(2, 128, 64), (2, 101, 70)]:
        us = random(shape, device)
        yield run_subspace_overlap, [us], [us.flip(0)]


def pairs(large: bool, device: str) -> Iterator[Case]:
    """Yields square shapes, and a tall one, whose depth is cut into parts."""
    small = [(2, 96, 40, 8), (2, 101, 37, 7), (1, 2048, 40, 8)]
    for b, m, k, r in [(64, 1280, 588, 32), (2, 10240, 588, 32)] if large else small:
        us, ut = (random((b, m, k), device) / m**0.5 for _ in range(2))
        yield run_project_pair, us, ut, random((b, r, m), device)


def products(large: bool, device: str) -> Iterator[Case]:
    """Yields rows of every dtype, by themselves and by others: tiles and steps that are cut."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = random((64, 1280, 1280) if large else (2, 101, 70), device, dtype)
        yield run_precise_product, x, None
        yield run_precise_product, x[:, :37], x


CASES: dict[str, Callable[[bool, str], Iterator[Case]]] = {
    "small_svd": partial(matrices, run_small_svd),
    "small_singular_values": partial(matrices, run_small_singular_values),
    "panel_qr": panels,
    "krylov_block": blocks,
    "subspace_overlap": overlaps,
    "project_pair": pairs,
    "precise_product": products,
}
"""Of each op with kernels for CUDA its calls: small ones, or as large as those of a transfer."""
