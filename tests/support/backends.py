"""The kernels under one of their backends, and what a missing one means."""

import importlib
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prolora.core.ops import native

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

    def __getattr__(self, op: str) -> Callable[..., Any]:
        """The op of this name."""
        return partial(self.run, op)

    def run(self, name: str, *operands: Any) -> Any:
        """What an op returns; krylov_block also what it makes of copies of what it writes."""
        op, like = native.OPS[name], operands[0]
        float64 = (like if isinstance(like, Tensor) else like[0]).dtype == torch.float64
        if self.cuda and float64 and name in ("project_pair", "subspace_overlap"):
            pytest.skip(f"torch does {name} on a GPU")
        if name == "panel_qr":
            operands = (*operands, None)[:2]
        there = [self._there(x) for x in operands]
        if name == "krylov_block" and self.device == "cpu":  # `to` makes copies elsewhere
            there[1:3] = [x.clone() for x in there[1:3]]
        found = op.run(self.module, *there, self.cuda) if self.module else op.twin(*there)
        if name == "krylov_block":
            found = (found, *there[1:3])
        if name == "precise_product":
            found = found[0]
        return found.cpu() if isinstance(found, Tensor) else tuple(x.cpu() for x in found)

    def _there(self, operand: Any) -> Any:
        if isinstance(operand, Tensor):
            return operand.to(self.device)
        return [x.to(self.device) for x in operand] if isinstance(operand, list) else operand


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
