"""precise_product: products as if in float64, from 8-bit integers on tensor cores."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from . import native, torch_twin
from .operands import ANY_DEVICE, library

STORED = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
"""The dtypes of operands, as StoredAs in csrc/ops.h numbers them."""

MAX_DEPTH = 21824
"""kMaxPreciseDepth in csrc/ops.h."""

DIGITS, STEP = 6, 32  # kDigits and kDigitStep in csrc/precise_product.h

library.define("precise_product(Tensor x, Tensor? y=None) -> Tensor")


def run_precise_product(kernels: ModuleType, x: Tensor, y: Tensor | None, cuda: bool) -> Tensor:
    """Runs the kernel: x [b, r, p], y [b, c, p] or x again -> float64 [b, r, c]."""
    x = x.contiguous()
    y = x if y is None else y.contiguous()
    b, rows, depth = x.shape
    both, pitch = b * (rows + (0 if y is x else y.shape[1])), -(-depth // STEP) * STEP
    product = x.new_empty(b, rows, y.shape[1], dtype=torch.float64)
    digits = x.new_empty(DIGITS, both, pitch, dtype=torch.int8)
    scales = x.new_empty(both, dtype=torch.float64)
    second = x.new_empty(0) if y is x else y  # the address of a tensor without elements is 0
    sizes = (b, rows, y.shape[1], depth, pitch, STORED[x.dtype], STORED[y.dtype])
    tensors = (x, second, product, digits, scales)
    native.run_kernel(kernels, "precise_product", tensors, sizes, cuda, False)
    return product


def check_factors(x: Tensor, y: Tensor) -> None:
    """Refuses what would be read wrongly."""
    for name, one in (("x", x), ("y", y)):
        if one.dtype not in STORED:
            raise TypeError(f"precise_product: {name} must be of 16, 32 or 64 bits")
        if one.device != x.device:
            raise TypeError(f"precise_product: x is on {x.device}, but y is on {one.device}")
    if x.ndim != 3 or y.ndim != 3 or x.shape[::2] != y.shape[::2] or not x.shape[2]:
        raise ShapeMismatch(
            f"precise_product: takes [b, r, p] and [b, c, p], p >= 1, not {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )


def _precise_product(x: Tensor, y: Tensor | None = None) -> Tensor:
    other = x if y is None else y
    check_factors(x, other)
    if x.shape[2] > MAX_DEPTH:
        return torch_twin.precise_product(x, y)
    sizes, twin = (*x.shape, 0 if y is None else y.shape[1]), torch_twin.precise_product
    return native.run_best(
        "precise_product", x, sizes, run_precise_product, twin, (x, y), lambda c: [c], native.FAR
    )


def _precise_product_fake(x: Tensor, y: Tensor | None = None) -> Tensor:
    other = x if y is None else y
    check_factors(x, other)
    return x.new_empty(len(x), x.shape[1], other.shape[1], dtype=torch.float64)


library.impl("precise_product", _precise_product, ANY_DEVICE)
torch.library.register_fake("prolora::precise_product", _precise_product_fake)


def precise_product(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Multiplies rows by rows: x yᵀ, or x xᵀ without y.

    On integer units the result errs by some 2⁻⁴⁴ of the two rows' lengths, and rows that hold NaN
    or Inf give NaN.

    x: [b, r, p], float16, bfloat16, float32 or float64; y: [b, c, p], of any of these. Returns
    float64 [b, r, c]. Not differentiable.

    Raises:
        TypeError: other dtypes, or two devices.
        ShapeMismatch: shapes that do not agree.
    """
    found: Tensor = torch.ops.prolora.precise_product(x, y)
    return found
