"""Short texts for `repr`: what a value is, without its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def format_shape(shape: Sequence[int]) -> str:
    """Writes [m, n] as "64×48", a stack [b, m, n] as "3 of 64×48"."""
    matrix = "×".join(str(size) for size in shape[-2:])
    if len(shape) <= 2:
        return matrix
    return f"{'×'.join(str(size) for size in shape[:-2])} of {matrix}"


def format_storage(tensor: Tensor) -> str:
    """Writes dtype and device, unless CPU: "float32" or "float16 on cuda:0"."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return dtype if tensor.device.type == "cpu" else f"{dtype} on {tensor.device}"


def format_range(values: Tensor, form: str = "") -> str:
    """Writes one number, or the smallest and the largest: "8" or "5 to 8"."""
    if values.is_meta or not values.numel():
        return "?"
    low, high = (format(x.item(), form) for x in torch.aminmax(values.detach()))
    return low if low == high else f"{low} to {high}"
