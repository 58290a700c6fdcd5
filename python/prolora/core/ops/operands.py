"""What every op asks of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ShapeMismatch

NAMESPACE = __name__.removesuffix(".core.ops.operands").replace(".", "_")
"""torch's name for the ops of this copy of the package: a second copy has another."""

registered = getattr(torch.ops, NAMESPACE)
"""The registered ops, to call."""
# The namespace keeps it: a second import of the package (autoreload) finds the ops of the first.
library = vars(registered).setdefault("library", None) or torch.library.Library(
    NAMESPACE, "FRAGMENT"
)
registered.library = library


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op for every device, once; `fake` gives outputs without numbers."""
    name = schema.partition("(")[0]
    if hasattr(registered, name):
        return
    library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)


def check_operands(op: str, **tensors: Tensor) -> None:
    """Checks operands: same dtype, device and leading dimensions; at least two dimensions.

    Raises:
        TypeError: no tensor, a dtype other than float32 and float64, or two dtypes or devices.
        ShapeMismatch: shapes that do not agree but for the last dimension.
    """
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, not {type(x).__name__}")
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} must be float32 or float64, not {x.dtype}")
        if x.dtype != first.dtype or x.device != first.device:
            raise TypeError(
                f"{op}: {first_name} is {first.dtype} on {first.device}, "
                f"but {name} is {x.dtype} on {x.device}"
            )
        if x.ndim < 2 or x.shape[:-1] != first.shape[:-1]:
            raise ShapeMismatch(
                f"{op}: shapes must agree but for the last dimension, with two or more dimensions; "
                f"{first_name} is {tuple(first.shape)}, {name} is {tuple(x.shape)}"
            )


def flatten_stack(x: Tensor) -> Tensor:
    """Reshapes [..., m, n] to [b, m, n]."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
