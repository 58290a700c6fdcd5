"""The kernels under one of their backends, and what a missing one means."""

import importlib
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prolora.core.ops import native, torch_twin
from prolora.core.ops.krylov_block import run_krylov_block
from prolora.core.ops.overlap_table import run_overlap_table
from prolora.core.ops.panel_qr import run_panel_qr
from prolora.core.ops.precise_product import run_precise_product
from prolora.core.ops.project_pair import run_project_pair
from prolora.core.ops.small_svd import run_small_singular_values, run_small_svd
from prolora.core.ops.tridiagonal import (
    run_tridiagonal_values,
    run_tridiagonal_vectors,
    run_tridiagonalise,
)

# PROLORA_REQUIRE=cpu,emulated turns the skip of a listed backend into a failure (for CI); "node"
# does so for Node.js, which runs the script of the ComfyUI nodes.
# PROLORA_NATIVE=OFF runs everything without the extension: cpu, emulated and cuda are skipped then.
REQUIRED = os.environ.get("PROLORA_REQUIRE", "").split(",")


@dataclass
class Kernels:
    """One backend; takes and gives CPU tensors whatever it runs on."""

    module: ModuleType | None  # None: the torch twin
    device: str = "cpu"
    cuda: bool = False

    def krylov_block(
        self, w: Tensor, rows: Tensor, projected: Tensor, size: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The length, and what it makes of copies of the two others."""
        w, rows, projected = self._there(w, rows, projected)
        if self.device == "cpu":  # `to` makes copies elsewhere
            rows, projected = rows.clone(), projected.clone()
        operands = (w, rows, projected, size, width)
        if self.module is None:
            length = torch_twin.krylov_block(*operands)
        else:
            length = run_krylov_block(self.module, *operands, self.cuda)
        return length.cpu(), rows.cpu(), projected.cpu()

    def overlap_table(self, us: Sequence[Tensor], ut: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self._call(run_overlap_table, torch_twin.overlap_table, self._there(us, ut))

    def project_pair(self, us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.cuda and us.dtype == torch.float64:
            pytest.skip("torch projects float64 on a GPU")
        return self._call(run_project_pair, torch_twin.project_pair, self._there(us, ut, x))

    def panel_qr(self, panel: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        scale = None if scale is None else scale.to(self.device)
        return self._call(run_panel_qr, torch_twin.panel_qr, [*self._there(panel), scale])

    def precise_product(self, x: Tensor, y: Tensor | None) -> Tensor:
        x, y = x.to(self.device), None if y is None else y.to(self.device)
        if self.module is None:
            return torch_twin.precise_product(x, y)[0]
        return run_precise_product(self.module, x, y, self.cuda)[0].cpu()

    def small_svd(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._call(run_small_svd, torch_twin.small_svd, self._there(a))

    def small_singular_values(self, a: Tensor) -> Tensor:
        values, twin = run_small_singular_values, torch_twin.small_singular_values
        x = a.to(self.device)
        return (values(self.module, x, self.cuda) if self.module else twin(x)).cpu()

    def tridiagonalise(self, symmetric: Tensor) -> tuple[Tensor, ...]:
        both = run_tridiagonalise, torch_twin.tridiagonalise
        return self._call(*both, [symmetric.to(self.device)])

    def tridiagonal_values(self, diagonal: Tensor, beside: Tensor, count: int) -> Tensor:
        if self.module is None:
            return torch_twin.tridiagonal_values(diagonal, beside, count)
        operands = (*self._there(diagonal, beside), count)
        return run_tridiagonal_values(self.module, *operands, self.cuda).cpu()

    def tridiagonal_vectors(self, diagonal: Tensor, beside: Tensor, values: Tensor) -> Tensor:
        if self.module is None:
            return torch_twin.tridiagonal_vectors(diagonal, beside, values)
        operands = self._there(diagonal, beside, values)
        return run_tridiagonal_vectors(self.module, *operands, self.cuda).cpu()

    def _there(self, *operands):
        lists = [[x] if isinstance(x, Tensor) else x for x in operands]
        moved = [[x.to(self.device) for x in some] for some in lists]
        return [
            some[0] if isinstance(given, Tensor) else some
            for given, some in zip(operands, moved, strict=True)
        ]

    def _call(self, run, twin, operands):
        outputs = run(self.module, *operands, self.cuda) if self.module else twin(*operands)
        return tuple(x.cpu() for x in outputs)


class GuardedMemory(TorchDispatchMode):
    """New tensors with guards on both sides, which no kernel may overwrite, and NaN inside."""

    MARGIN = 256

    def __init__(self):
        super().__init__()
        self.rooms = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten.new_empty.default:
            dtype, size = kwargs.get("dtype") or args[0].dtype, args[1]
        elif function is torch.ops.aten.empty.memory_format:
            dtype, size = kwargs.get("dtype") or torch.float32, args[0]
        elif function is torch.ops.aten.empty_like.default and args[0].is_contiguous():
            dtype, size = kwargs.get("dtype") or args[0].dtype, args[0].shape
        else:
            return function(*args, **kwargs)
        count = math.prod(size) * dtype.itemsize
        room = torch.full((count + 2 * self.MARGIN,), 255, dtype=torch.uint8)
        self.rooms.append(room)
        return room[self.MARGIN : self.MARGIN + count].view(dtype).view(size)

    def check(self):
        for room in self.rooms:
            ends = torch.cat([room[: self.MARGIN], room[-self.MARGIN :]])
            assert (ends == 255).all(), "a kernel wrote beyond an output or its scratch"

    def inside(self, i):
        """What is between the guards of tensor i, in bytes."""
        return self.rooms[i][self.MARGIN : -self.MARGIN]


def missing(backend: str, reason: object) -> None:
    (pytest.fail if backend in REQUIRED else pytest.skip)(f"{backend}: {reason}")


def find_node() -> str:
    """Node.js, which runs the scripts of pages and nodes."""
    return shutil.which("node") or missing("node", "Node.js is not installed") or ""


def load(backend: str, name: str) -> ModuleType:
    """A compiled module. One that is not there is skipped; one that does not load is a failure."""
    why = native.EXTENSION.why
    if why.startswith("it cannot be loaded"):
        pytest.fail(f"{backend}: there is a compiled extension, but {why}")
    if native.EXTENSION.kernels is None:
        missing(backend, f"no compiled extension: {why}")
    try:
        return importlib.import_module(f"prolora.core.{name}")
    except ModuleNotFoundError as error:
        missing(backend, error)
        raise
