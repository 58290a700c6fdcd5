"""Counts of what a call asks of a device: dispatches, host synchronisations, flops and bytes.

Everything is counted on the CPU, from the calls that torch dispatches. A call of a custom op or of
LAPACK is one dispatch. What lies below torch's dispatcher (the kernels that one call launches on a
GPU) is not seen.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# On a GPU the host waits in these: for a number, or for the size of a result.
WAITING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "_unique2",
    "unique_dim",
    # torch looks at the solver's info.
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_eig",
    "linalg_inv_ex",
    "linalg_lstsq",
}
# Methods that copy to the host without a dispatch, where the tensor is there already.
READING = ("tolist", "cpu", "numpy", "__array__")
# Aten's names of products -> the positions of the two factors.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "mv": (0, 1)}
FACTORISATIONS = {
    "_linalg_eigh": "eigh",
    "linalg_eigh": "eigh",
    "_linalg_svd": "svd",
    "linalg_qr": "qr",
    "geqrf": "qr",
    "linalg_cholesky_ex": "cholesky",
    "linalg_cholesky": "cholesky",
    "linalg_solve_triangular": "triangular",
    "panel_qr": "panel",
    "small_svd": "small_svd",
    "small_singular_values": "small_svd",
}


@dataclass(frozen=True)
class Call:
    """One kind of dispatch: equal ones are counted together."""

    stage: str  # of the algorithm
    op: str  # aten's name of it, or the kind of factorisation
    kind: str  # "view" (nothing runs), "product", "factorisation" or "pass" (over memory)
    dtype: str  # of the largest operand
    # [batch, rows, inner, columns] of a product, [batch, rows, columns] of a factorisation,
    # [bytes] of a pass
    shape: tuple[int, ...]
    flops: int  # of a product
    bytes: int  # read and written


@dataclass
class Tally:
    """What has been counted."""

    calls: Counter[Call] = field(default_factory=Counter)  # how often each kind of dispatch came
    waits: Counter[str] = field(default_factory=Counter)  # host synchronisations by stage

    @property
    def dispatches(self) -> int:
        """All calls but those that give a view."""
        return sum(n for call, n in self.calls.items() if call.kind != "view")

    def flops(self, dtype: str) -> int:
        """Of the products in one dtype."""
        return sum(n * call.flops for call, n in self.calls.items() if call.dtype == dtype)

    @property
    def bytes(self) -> int:
        """Read and written by all calls, each by itself."""
        return sum(n * call.bytes for call, n in self.calls.items())

    def factorisations(self) -> dict[str, int]:
        """How often each came, by kind, dtype and shape."""
        counts = Counter[str]()
        for call, n in self.calls.items():
            if call.kind == "factorisation":
                counts[f"{call.op} {call.dtype} {'x'.join(map(str, call.shape))}"] += n
        return dict(counts)


class Counting(TorchDispatchMode):
    """Counts while it is entered, in this thread."""

    def __init__(self, stage_of: Callable[[Any], str]) -> None:
        super().__init__()
        self.tally = Tally()
        self._stage_of = stage_of

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        stage = self._stage_of(sys._getframe(1))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = func._schema.name.rpartition("::")[2]
        if _waits(name, args):
            self.tally.waits[stage] += 1
        made = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        self.tally.calls[_describe(stage, func, name, args, tensors, made)] += 1
        return outputs


@contextmanager
def counting(stage_of: Callable[[Any], str]) -> Any:
    """A Tally of what this thread calls inside; tolist(), cpu() and numpy() are seen too."""
    mode = Counting(stage_of)

    def noticed(original: Any) -> Any:
        def wrapped(tensor: Tensor, *args: Any, **options: Any) -> Any:
            mode.tally.waits[stage_of(sys._getframe(1))] += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return original(tensor, *args, **options)

        return wrapped

    patches = [mock.patch.object(Tensor, m, noticed(getattr(Tensor, m))) for m in READING]
    for patch in patches:
        patch.start()
    try:
        with mode:
            yield mode.tally
    finally:
        for patch in patches:
            patch.stop()


def _waits(name: str, args: Any) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        return any(x.dtype in (torch.bool, torch.uint8) for x in masks)
    return name in WAITING


def _describe(
    stage: str, func: Any, name: str, args: Any, tensors: list[Tensor], made: list[Tensor]
) -> Call:
    largest = max([*tensors, *made], key=lambda x: x.numel(), default=None)
    dtype = str(largest.dtype).removeprefix("torch.") if largest is not None else "none"
    if _is_view(func, tensors, made):
        return Call(stage, name, "view", dtype, (), 0, 0)
    moved = sum(_size(x) for x in [*tensors, *made])
    if name in PRODUCTS:
        x, y = (args[i] for i in PRODUCTS[name])
        batch = x.shape[0] if x.ndim == 3 else 1
        columns = y.shape[-1] if y.ndim > 1 else 1
        shape = (batch, x.shape[-2], x.shape[-1], columns)
        return Call(stage, name, "product", dtype, shape, 2 * prod(shape), moved)
    if name == "krylov_block":
        return _describe_block(stage, args, made)
    if name == "precise_product":
        return _describe_precise(stage, args, moved)
    if name in FACTORISATIONS and largest is not None:
        x = args[1] if name == "linalg_solve_triangular" else args[0]
        shape = (prod(x.shape[:-2]), *x.shape[-2:])
        kind = FACTORISATIONS[name]
        return Call(stage, kind, "factorisation", dtype, shape, 0, moved)
    return Call(stage, name, "pass", dtype, (moved,), 0, moved)


def _describe_block(stage: str, args: Any, made: list[Tensor]) -> Call:
    """Its products, in float32: two with W, which is read twice, and four with the basis."""
    w, rows, _, size, width = args
    b, d, n = w.shape
    flops = b * width * (4 * d * n + 8 * d * size)
    basis = b * size * d * rows.element_size()
    moved = 2 * _size(w) + 4 * basis + sum(_size(x) for x in made)
    shape = (b, width, d, 2 * n + 4 * size)
    return Call(stage, "krylov_block", "product", "float32", shape, flops, moved)


def _describe_precise(stage: str, args: Any, moved: int) -> Call:
    """A product in float64, of which five eighths are computed where x is multiplied by itself."""
    x, y = (*args, None)[:2]
    shape = (*x.shape[:2], x.shape[2], (x if y is None else y).shape[1])
    flops = 2 * prod(shape) * (5 if y is None else 8) // 8
    return Call(stage, "precise_product", "product", "float64", shape, flops, moved)


def _is_view(func: Any, tensors: list[Tensor], made: list[Tensor]) -> bool:
    """Whether a call gives nothing but another view of what it was given, or a new tensor as is."""
    if not made:
        return False
    if func._schema.name in ("aten::empty", "aten::empty_like", "aten::new_empty"):
        return True
    if any(x.alias_info and x.alias_info.is_write for x in func._schema.arguments):
        return False
    known = {x.untyped_storage()._cdata for x in tensors}
    return bool(known) and all(x.untyped_storage()._cdata in known for x in made)


def _size(x: Tensor) -> int:
    """Bytes of a tensor; of one that was expanded, those in memory."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
