"""cut_side: singular vectors of small weights on the smaller side of a cut, in one call.

It runs in the extension on a CPU only. svd/smaller_side.py computes the same by calls of torch, and
explains it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch
from . import native

FACTS = ("leading", "number", "count", "following", "bound", "smallest", "energy", "error")
"""CutFacts in csrc/cut_side.h."""


def cut_side(
    w: Tensor, gram: Tensor, rank: int | float, leading: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the singular vectors on the smaller side of the cut, or always the leading ones.

    Args:
        w: [b, d, n], d ≤ n, float64, finite.
        gram: wwᵀ [b, d, d].
        rank: columns to keep, or the share of Σσ² that they hold.
        leading: always the columns that are kept.

    Returns:
        Rows [b, p, d] of the short side, [b, p, n] of the long side and singular values [b, p], of
        which those behind a matrix's number are not initialised; p is d // 2, or d for leading
        ones. And the facts [b, 8], named in FACTS.

    Raises:
        TypeError: another dtype.
        ShapeMismatch: shapes that do not agree.
    """
    b, d, n = w.shape
    if w.dtype != torch.float64 or gram.dtype != torch.float64:
        raise TypeError(f"cut_side: takes float64, not {w.dtype} and {gram.dtype}")
    if d > n or gram.shape != (b, d, d) or not d:
        raise ShapeMismatch(
            f"cut_side: takes [b, d, n] with d <= n and [b, d, d], not {tuple(w.shape)} and "
            f"{tuple(gram.shape)}"
        )
    share = w.new_tensor([rank if isinstance(rank, float) else 0.0])
    rows = d if leading else max(1, d // 2)
    shorts, longs, s = w.new_empty(b, rows, d), w.new_empty(b, rows, n), w.new_empty(b, rows)
    facts = w.new_empty(b, len(FACTS))
    tensors = {"w": w.contiguous(), "gram": gram.contiguous(), "share": share}
    tensors |= {"shorts": shorts, "longs": longs, "s": s, "facts": facts}
    whole = 0 if isinstance(rank, float) else min(rank, d)
    sizes = {"batch": b, "d": d, "n": n, "rows": rows, "rank": whole, "leading": leading}
    native.run_kernel(native.require_extension(), "cut_side", False, True, tensors, sizes)
    return shorts, longs, s, facts
