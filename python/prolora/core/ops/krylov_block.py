"""krylov_block: a block of a block Krylov iteration, from weights in their stored 16 bits."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from . import native
from .operands import register, registered
from .panel_qr import DEPENDENT, factor_panel

STORED = {torch.float16: 0, torch.bfloat16: 1}
"""The dtypes of weights, as StoredAs in csrc/ops.h numbers them."""

MAX_WIDTH = 64
"""kMaxKrylovWidth in csrc/ops.h."""

# Of a unit row whose component in the basis has been subtracted, this much must be left, or the row
# is dropped: it consisted of rounding errors of the first subtraction. kOutside in krylov_block.h.
OUTSIDE = 1e-2

# Rows that the kernels can take: kMaxStride in csrc/tile.h.
MAX_ROW = 2**24


def run_krylov_block(
    kernels: ModuleType,
    w: Tensor,
    rows: Tensor,
    projected: Tensor,
    size: int,
    width: int,
    cuda: bool,
) -> Tensor:
    """Runs the kernel on W [b, d, n], contiguous or transposed; writes `rows`, `projected`."""
    b, d, n = w.shape
    room = rows.shape[1]
    transposed = not w.is_contiguous()
    with native.on_device(w):
        parts = kernels.krylov_block_scratch(b, d, n, size, width, cuda)
    length = rows.new_empty(b, dtype=torch.float64)
    tensors = {
        "w": w.mT if transposed else w,
        "rows": rows,
        "projected": projected,
        "length": length,
        "lengths": rows.new_empty(b, 2, width, dtype=torch.float64),
        "images": rows.new_empty(b, width, n),
        "image": rows.new_empty(b, width, d),
        "coefficients": rows.new_empty(b, width, size),
        "parts": rows.new_empty(parts),
        "l": rows.new_empty(b, width, width),
        "rank": rows.new_empty(b, dtype=torch.int64),
    }
    sizes = {
        "batch": b,
        "d": d,
        "n": n,
        "room": room,
        "size": size,
        "width": width,
        "stored": STORED[w.dtype],
        "transposed": int(transposed),
    }
    native.run_kernel(kernels, "krylov_block", cuda, False, tensors, sizes)
    return length


def extend_block(w: Tensor, rows: Tensor, projected: Tensor, size: int, width: int) -> Tensor:
    """Computes the next block of a basis, and the last image's length outside it.

    w: [b, d, n], any dtype; rows: [b, room, d], the first `size` in use; the next `width` are
    written; projected: [b, room, room]; its rows `size` − `width` to `size` are written; size: of
    the basis; width: of a block. Returns float64 [b].
    """
    earlier, last = rows[:, :size], slice(size - width, size)
    single = w.to(rows.dtype)
    image = earlier[:, last] @ single @ single.mT
    column = image @ earlier.mT
    image = torch.baddbmm(image, column, earlier, alpha=-1)
    projected[:, last, :size] = column
    if size + width <= rows.shape[1]:
        scale = torch.linalg.vector_norm(column, dim=(-2, -1), dtype=torch.float64)
        block = factor_panel(image, scale)[0].nan_to_num(0.0)
        # Of a short image the rounding errors of the subtraction are a large part, and they are not
        # orthogonal to the basis: subtract once more.
        block = torch.baddbmm(block, block @ earlier.mT, earlier, alpha=-1)
        outside = torch.full_like(scale, OUTSIDE / DEPENDENT)
        block = factor_panel(block, outside)[0].nan_to_num(0.0)
        rows[:, size : size + width] = block
    # As the kernels do: in float32 the squares of what is large or small leave its range.
    length: Tensor = torch.linalg.vector_norm(image, dim=(-2, -1), dtype=torch.float64)
    return length


def check_block(w: Tensor, rows: Tensor, projected: Tensor, size: int, width: int) -> None:
    """Refuses, also of who calls the operator itself, what would be read or written wrongly."""
    for name, x in {"w": w, "rows": rows, "projected": projected}.items():
        if x.device != w.device:
            raise TypeError(f"krylov_block: w is on {w.device}, but {name} is on {x.device}")
        if x.ndim != 3 or not (x.is_contiguous() or (x is w and x.mT.is_contiguous())):
            raise TypeError(f"krylov_block: {name} must be a contiguous stack of matrices")
        if x.dtype not in (STORED if x is w else (torch.float32,)):
            needed = "float16 or bfloat16" if x is w else "float32"
            raise TypeError(f"krylov_block: {name} must be {needed}, not {x.dtype}")
    (b, d, _), room = w.shape, rows.shape[1]
    wanted = {"rows": (b, room, d), "projected": (b, room, room)}
    for name, x in (("rows", rows), ("projected", projected)):
        if x.shape != wanted[name]:
            raise ShapeMismatch(
                f"krylov_block: {name} must be {wanted[name]}, not {tuple(x.shape)}"
            )
    if not 1 <= width <= min(size, d, MAX_WIDTH) or size > room:
        raise ShapeMismatch(
            f"krylov_block: takes 1 <= width <= size <= room, and width <= d and "
            f"{MAX_WIDTH}; not width {width}, size {size}, room {room}, d {d}"
        )


def _krylov_block(w: Tensor, rows: Tensor, projected: Tensor, size: int, width: int) -> Any:
    check_block(w, rows, projected, size, width)
    choice, op = native.choose("krylov_block", w.device), native.OPS["krylov_block"]
    if choice.kernels is None or max(w.shape[1:]) > MAX_ROW:
        return op.twin(w, rows, projected, size, width)
    return op.run(choice.kernels, w, rows, projected, size, width, choice.cuda)


def _krylov_block_fake(w: Tensor, rows: Tensor, projected: Tensor, size: int, width: int) -> Tensor:
    check_block(w, rows, projected, size, width)
    return rows.new_empty(w.shape[0], dtype=torch.float64)


native.OPS["krylov_block"] = native.Op(run_krylov_block, extend_block, on_cpu=native.PRODUCTS)
register(
    "krylov_block(Tensor w, Tensor(a!) rows, Tensor(b!) projected, int size, int width) -> Tensor",
    _krylov_block,
    _krylov_block_fake,
)


def krylov_block(w: Tensor, rows: Tensor, projected: Tensor, size: int, width: int) -> Tensor:
    """Extends an orthonormal basis of span{Y, GY, G²Y, …}, G = wwᵀ, by a block.

    The last `width` of the rows in use are multiplied by G, without a float32 copy of w; what the
    basis holds of the product is removed, its coefficients become rows of the projection of G, and
    the rest, made orthonormal before and after a second removal, is the next block, where there is
    room for it. A direction that adds nothing is a zero row. Nothing waits for the device.

    w: [b, d, n], float16 or bfloat16, contiguous or the transpose of a contiguous tensor; rows:
    [b, room, d], float32, contiguous: the first `size` are the basis, the `width` behind them are
    written; projected: [b, room, room], float32, contiguous: its rows `size` − `width` to `size`
    are written, up to the diagonal block; width: of a block, at most 64 and d. Returns float64 [b],
    ‖·‖_F of what G adds to the basis.

    Raises:
        TypeError: other dtypes, two devices, or another layout.
        ShapeMismatch: shapes or sizes that do not agree.
    """
    for name, x in (("w", w), ("rows", rows), ("projected", projected)):
        if not isinstance(x, Tensor):
            raise TypeError(f"krylov_block: {name} must be a torch.Tensor, not {type(x).__name__}")
    block: Tensor = registered.krylov_block(w, rows, projected, size, width)
    return block
