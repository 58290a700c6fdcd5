"""Which of prolora's own ops each call runs on a GPU, and their share of torch's dispatches.

    python bench/own_ops.py

The CPU takes whole stacks as a GPU does, and every call of an operator is counted. Prints the table
of docs/performance.md. A share of dispatches is not one of time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prolora
from prolora.core.svd import stacks

MODELS = Path(__file__).parents[1] / "examples" / "mini_family" / "weights"


class CountOps(TorchDispatchMode):
    """Counts the operators of each namespace, those inside of our own ops left out."""

    def __init__(self) -> None:
        """Starts at nothing."""
        super().__init__()
        self.own = Counter[str]()
        self.others = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Counts one call."""
        space, _, name = function.name().partition("::")
        if space == "prolora":
            self.own[name] += 1
        else:
            self.others += 1
        return function(*args, **(kwargs or {}))


def list_calls() -> dict[str, Callable[[], Any]]:
    """Name -> call, at sizes that take the same rungs as the published models'."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    fall = torch.arange(1, 769).rsqrt()
    u, v = (torch.linalg.qr(random(1, 768, 768))[0] for _ in range(2))
    w = (u * fall) @ v.mT
    other = w + 0.001 * random(1, 768, 768)
    delta = prolora.LowRank(random(1, 768, 8), random(1, 8, 768))
    thick = MODELS / "loras" / "thick.safetensors"

    def move(method: str) -> Callable[[], Any]:
        return lambda: prolora.transfer(
            thick, MODELS / "source", MODELS / "pruned", method=method, cache=None
        )

    def ask_for_blocks() -> None:
        with mock.patch.dict(os.environ, PROLORA_KERNELS="krylov_block"):
            prolora.truncated_svd(w.bfloat16(), 96)

    return {
        "`truncated_svd`, k = d/8": lambda: prolora.truncated_svd(w, 96),
        "the same in bfloat16, `krylov_block` asked for": ask_for_blocks,
        "`truncated_svd`, k = d/2": lambda: prolora.truncated_svd(w, 384),
        "`truncated_svd`, energy 0.9": lambda: prolora.truncated_svd(w, 0.9),
        "`principal_angles`, 128 columns": lambda: prolora.principal_angles(
            u[..., :128], v[..., :128]
        ),
        "`principal_angles`, 192 columns": lambda: prolora.principal_angles(
            u[..., :192], v[..., :192]
        ),
        "`similarity`, k = d/8": lambda: prolora.similarity(w, other, rank=96),
        "`project`, k = d/8": lambda: prolora.project(delta, w, other, rank=96),
        "`transfer`, copy, 64 to 256 wide": move("copy"),
        "`transfer`, prolora, 64 to 256 wide": move("prolora"),
    }


def render_table() -> str:
    """A row a call."""
    lines = ["| call | own ops | share of dispatches |", "|---|---|---|"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other threads are not counted
    try:
        lines += [_count_row(name, call) for name, call in list_calls().items()]
    finally:
        torch.set_num_threads(threads)
    return "\n".join(lines)


def _count_row(name: str, call: Callable[[], Any]) -> str:
    with mock.patch.object(stacks, "CPU_AS_GPU", True), CountOps() as counted:
        call()
    own = ", ".join(f"`{op}` × {n}" for op, n in sorted(counted.own.items())) or "none"
    total = sum(counted.own.values())
    share = 100 * total / max(1, total + counted.others)
    return f"| {name} | {own} | {share:.1f} % |"


if __name__ == "__main__":
    print(render_table())
