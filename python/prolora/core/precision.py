"""In what precision arithmetic runs: float32 or better, whatever the storage dtype."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where any operand is float64, else float32; torch promotes no float8 itself."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf; takes float8 too, which `torch.isfinite` does not.

    A finite sum has finite terms: one pass that allocates nothing decides almost every tensor. The
    sum of finite values can overflow, and then every value is looked at.
    """
    values = tensor.float() if tensor.element_size() == 1 else tensor
    if values.is_floating_point():
        if bool(values.sum(dtype=working_dtype(values.dtype)).isfinite()):
            return True
    return bool(values.isfinite().all())


def in_full_precision(function: AnyFunction) -> AnyFunction:
    """The function, deaf to the caller's autocast and float32 precision (see `full_precision`)."""

    @wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        with full_precision():
            return function(*args, **options)

    return cast(AnyFunction, wrapped)


@contextmanager
def full_precision() -> Iterator[None]:
    """Switches autocast off, and TF32 and bfloat16 products of float32 matrices.

    Bounds are proved for float32 products that keep 24 bits. Autocast belongs to a thread; the
    precision of products belongs to the process, so that the products of other threads keep 24 bits
    too for that long.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_PRODUCTS.exact())
        yield


class _ProductPrecision:
    """The process-wide precision of float32 products, counted over the threads that pin it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets who has pinned it: in a forked child nobody has."""
        self._lock, self._users = threading.Lock(), 0
        self._before: tuple[str | None, ...] = ()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Pins it; the last thread to leave puts back what the first one found."""
        with self._lock:
            if not self._users:
                self._before = _read_product_precision()
                common = None if self._before[0] is None else "highest"
                _write_product_precision(common, *["ieee"] * len(_LIBRARIES))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                # What somebody else has set in the meantime stays.
                if not self._users and set(_read_product_precision()) <= {"highest", "ieee"}:
                    _write_product_precision(*self._before)


# torch 2.9 has a setting for each library beside the old one for all, and checks in some places
# that they agree: so both are pinned.
_LIBRARIES = [
    library.matmul
    for library in (torch.backends.cuda, torch.backends.mkldnn)
    if hasattr(getattr(library, "matmul", None), "fp32_precision")
]


def _read_product_precision() -> tuple[str | None, ...]:
    """The setting for all libraries, None where torch calls it contradictory, and for each."""
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:
        common = None
    return common, *(library.fp32_precision for library in _LIBRARIES)


def _write_product_precision(common: str | None, *each: str | None) -> None:
    if common is not None and _read_product_precision()[0] != common:
        torch.set_float32_matmul_precision(common)
    for library, value in zip(_LIBRARIES, each, strict=True):
        if library.fp32_precision != value:
            library.fp32_precision = value


_PRODUCTS = _ProductPrecision()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PRODUCTS.reset)
