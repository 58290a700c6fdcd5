"""precise_product: products as if in float64, from 8-bit integers on tensor cores."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from ..symmetric import lower_gram, mirror_lower
from . import native
from .operands import register, registered

STORED = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
"""The dtypes of operands, as StoredAs in csrc/ops.h numbers them."""

MAX_DEPTH = 21824
"""kMaxPreciseDepth in csrc/ops.h."""

DIGITS, STEP = 6, 32  # kDigits and kDigitStep in csrc/precise_product.h

# Of the powers of two of both rows, what each term of a sum may err (csrc/precise_product.h); and
# the power of two between those and the scales that the kernel keeps.
TERM_ERROR, SCALE = 5 * 2.0**-46, 2.0**26


def run_precise_product(
    kernels: ModuleType, x: Tensor, y: Tensor | None, cuda: bool
) -> tuple[Tensor, Tensor]:
    """Runs the kernel: x [b, r, p], y [b, c, p] or x again -> float64 [b, r, c], error [b]."""
    x = x.contiguous()
    y = x if y is None else y.contiguous()
    b, rows, depth = x.shape
    both, pitch = b * (rows + (0 if y is x else y.shape[1])), -(-depth // STEP) * STEP
    product = x.new_empty(b, rows, y.shape[1], dtype=torch.float64)
    scales = x.new_empty(both, dtype=torch.float64)
    tensors = {
        "x": x,
        "y": x.new_empty(0) if y is x else y,  # the address of a tensor without elements is 0
        "product": product,
        "digits": x.new_empty(DIGITS, both, pitch, dtype=torch.int8),
        "scales": scales,
    }
    sizes = {
        "batch": b,
        "rows": rows,
        "cols": y.shape[1],
        "depth": depth,
        "pitch": pitch,
        "x_stored": STORED[x.dtype],
        "y_stored": STORED[y.dtype],
    }
    native.run_kernel(kernels, "precise_product", cuda, False, tensors, sizes)
    of_x = torch.linalg.vector_norm(scales[: b * rows].view(b, rows) * SCALE, dim=1)
    of_y = (
        of_x
        if y is x
        else torch.linalg.vector_norm(scales[b * rows :].view(b, y.shape[1]) * SCALE, dim=1)
    )
    return product, of_x * of_y * (depth * TERM_ERROR)


def multiply_wide(x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Multiplies in float64: x [b, r, p], y [b, c, p], any dtype -> x yᵀ, or x xᵀ; zeros [b]."""
    product = mirror_lower(lower_gram(x)) if y is None else x.double() @ y.double().mT
    return product, product.new_zeros(len(x))


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


def _precise_product(x: Tensor, y: Tensor | None = None) -> Any:
    check_factors(x, x if y is None else y)
    if x.shape[2] > MAX_DEPTH:
        return multiply_wide(x, y)
    sizes = (*x.shape, 0 if y is None else y.shape[1])
    return native.run_best("precise_product", x, sizes, x, y)


def _precise_product_fake(x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    other = x if y is None else y
    check_factors(x, other)
    product = x.new_empty(len(x), x.shape[1], other.shape[1], dtype=torch.float64)
    return product, product.new_empty(len(x))


native.OPS["precise_product"] = native.Op(
    run_precise_product,
    multiply_wide,
    lambda both: both[:1],
    native.FAR,
    on_cpu="torch's float64 is faster on a CPU",
)
register(
    "precise_product(Tensor x, Tensor? y=None) -> (Tensor, Tensor)",
    _precise_product,
    _precise_product_fake,
)


def precise_product(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Multiplies rows by rows: x yᵀ, or x xᵀ without y.

    Rows that hold NaN or Inf give NaN.

    x: [b, r, p], float16, bfloat16, float32 or float64; y: [b, c, p], of any of these. Returns
    float64 [b, r, c]. Not differentiable.

    Raises:
        TypeError: other dtypes, or two devices.
        ShapeMismatch: shapes that do not agree.
    """
    product: Tensor = measured_product(x, y)[0]
    return product


def measured_product(x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns `precise_product` and a bound on ‖·‖_F of its error beyond float64's own, [b].

    0 where float64 multiplied. On integer units a sum of p terms errs by p·5·2⁻⁴⁶ of the powers of
    two above its two rows' largest numbers: more than float64's rounding where a row holds one
    large number and many small ones.
    """
    product, error = registered.precise_product(x, y)
    return product, error
