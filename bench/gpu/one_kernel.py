"""Each native op once, small: what compute-sanitizer and ncu run. `python -m gpu.one_kernel OP`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prolora.core.ops import trial
from prolora.core.ops.krylov_block import STORED, krylov_block
from prolora.core.ops.overlap_table import overlap_table
from prolora.core.ops.panel_qr import panel_qr
from prolora.core.ops.precise_product import precise_product
from prolora.core.ops.project_pair import project_pair
from prolora.core.ops.small_svd import small_singular_values, small_svd
from prolora.core.svd import krylov


def random(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def run_small_svd(device: str, large: bool) -> None:
    """Shared memory, more of it than 48 KiB, and global scratch."""
    sizes = [(64, 64), (128, 128), (512, 128)] if large else [(9, 7), (80, 80), (300, 100)]
    for m, n in sizes:
        a = random(64 if large else 2, m, n, device=device)
        small_svd(a)
        small_singular_values(a)


def run_panel_qr(device: str, large: bool) -> None:
    """Panels of three widths: the widest is in global memory on cards for games."""
    for rows in (32, 64, 128):
        shape = (64 if large else 2, rows, 1280 if large else 160)
        panel_qr(random(*shape, device=device))


def make_basis(b: int, d: int, size: int, room: int, device: str) -> tuple[Tensor, Tensor]:
    """Orthonormal rows [b, room, d], `size` of them, and room for their projection."""
    rows = torch.zeros(b, room, d, device=device)
    rows[:, :size] = torch.linalg.qr(random(b, d, size, device=device))[0].mT
    return rows, torch.zeros(b, room, room, device=device)


def run_krylov_block(device: str, large: bool) -> None:
    """Both dtypes and layouts; few matrices, whose products are cut into parts; cut tiles."""
    small = [(2, 96, 128, 32, 16), (1, 101, 1031, 21, 7)]
    for b, d, n, size, width in [(64, 1280, 1280, 256, 32)] if large else small:
        rows, projected = make_basis(b, d, size, size + width, device)
        for dtype in (torch.float16, torch.bfloat16):
            w = random(b, d, n, device=device, dtype=dtype)
            krylov_block(w, rows, projected, size, width)
            krylov_block(w.mT.contiguous().mT, rows, projected, size, width)


def run_overlap_table(device: str, large: bool) -> None:
    """Rows that copies of 16 bytes take, and rows that they do not."""
    for shape in [(64, 1280, 128)] if large else [(2, 128, 64), (2, 101, 70)]:
        us = random(*shape, device=device)
        overlap_table([us], [us.flip(0)])


def run_project_pair(device: str, large: bool) -> None:
    """Square shapes, and a tall one, whose depth is cut into parts."""
    small = [(2, 96, 40, 8), (2, 101, 37, 7), (1, 2048, 40, 8)]
    for b, m, k, r in [(64, 1280, 588, 32), (2, 10240, 588, 32)] if large else small:
        us, ut = (random(b, m, k, device=device) / m**0.5 for _ in range(2))
        project_pair(us, ut, random(b, r, m, device=device))


def run_precise_product(device: str, large: bool) -> None:
    """With itself and with another, of every dtype; tiles that are cut, a step that is."""
    b, rows, depth = (64, 1280, 1280) if large else (2, 101, 70)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = random(b, rows, depth, device=device, dtype=dtype)
        precise_product(x)
        precise_product(x[:, :37], x)


KERNELS: dict[str, Callable[[str, bool], Any]] = {
    "small_svd": run_small_svd,
    "panel_qr": run_panel_qr,
    "krylov_block": run_krylov_block,
    "overlap_table": run_overlap_table,
    "project_pair": run_project_pair,
    "precise_product": run_precise_product,
}


@contextmanager
def by_kernels() -> Iterator[None]:
    """What has kernels runs them, without a trial; in a dry run, too, the blocks of a basis."""

    def takes_stored(*operands: Any) -> bool:
        return operands[-1] is not None and operands[-1].dtype in STORED

    with (
        mock.patch.object(trial, "prefers_kernel", lambda *_: True),
        mock.patch.object(krylov, "_takes_stored", takes_stored),
    ):
        yield


def main() -> None:
    """`one_kernel OP DEVICE [large]`."""
    with by_kernels():
        KERNELS[sys.argv[1]](sys.argv[2], sys.argv[3:] == ["large"])
    if sys.argv[2] == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
