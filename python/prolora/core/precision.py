"""In what precision arithmetic runs: float32 or better, whatever the storage dtype."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Returns float64 if any operand is float64, else float32.

    torch itself promotes no float8.
    """
    return torch.float64 if torch.float64 in dtypes else torch.float32


def is_finite(tensor: Tensor) -> bool:
    """Returns whether no value is NaN or Inf; takes float8, unlike `torch.isfinite`.

    A finite sum has finite terms: one pass that allocates nothing decides almost every tensor. The
    sum of finite values can overflow, and then every value is looked at.
    """
    values = tensor.float() if tensor.element_size() == 1 else tensor
    if values.is_floating_point():
        if bool(values.sum(dtype=working_dtype(values.dtype)).isfinite()):
            return True
    return bool(values.isfinite().all())


def in_full_precision(function: AnyFunction) -> AnyFunction:
    """Shields a function from the caller's settings for arithmetic (see `full_precision`)."""

    @wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        with full_precision():
            return function(*args, **options)

    return cast(AnyFunction, wrapped)


@contextmanager
def full_precision() -> Iterator[None]:
    """Switches autocast off, and TF32 and bfloat16 in products and convolutions of float32.

    Bounds are proved for float32 products that keep 24 bits, and images of models in float32 are
    meant to be that. Autocast belongs to a thread; these settings belong to the process, so that
    other threads keep 24 bits too for that long. Tensors that are made without a device are made
    on the CPU, whatever the caller's default is.
    """
    with ExitStack() as stack:
        if read_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_ARITHMETIC.exact())
        yield


# Before, `get_default_device` fails after `set_default_device(None)` and overlooks
# `with torch.device`. A tensor is right in every version, and counted as an operator. The
# comparison of versions takes longer than the rest.
_KNOWS_DEFAULT_DEVICE = not torch.__version__ < "2.13"


def read_default_device() -> torch.device:
    """Returns the caller's device for new tensors."""
    if not _KNOWS_DEFAULT_DEVICE:
        return torch.empty(0).device
    return torch.get_default_device()


class _Setting(NamedTuple):
    """A setting of torch that costs float32 some of its 24 bits."""

    # Raises RuntimeError where torch finds that it contradicts another
    read: Callable[[], str | bool]
    write: Callable[[Any], None]
    exact: str | bool  # the value that keeps all bits

    def look(self) -> str | bool | None:
        """Returns its value, None where torch calls it contradictory."""
        try:
            return self.read()
        except RuntimeError:
            return None

    def put(self, value: str | bool | None) -> None:
        """Sets it, if that is a value and another than it has: writing one sets others too."""
        if value is not None and self.look() != value:
            self.write(value)


def _list_settings() -> list[_Setting]:
    """Returns this torch's settings for products of matrices and for convolutions.

    torch 2.9 has one for each library and operation beside the old ones for all, and checks in some
    places that they agree: so all are pinned, the old ones first, which set the new ones.
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    settings = [
        _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        _Setting(
            partial(getattr, cudnn, "allow_tf32"), partial(setattr, cudnn, "allow_tf32"), False
        ),
    ]
    for library, operations in (
        (torch.backends.cuda, ["matmul"]),
        (cudnn, ["conv", "rnn"]),
        (mkldnn, ["matmul", "conv", "rnn"]),
    ):
        for one in (getattr(library, name, None) for name in operations):
            if hasattr(one, "fp32_precision"):
                name = "fp32_precision"
                settings.append(
                    _Setting(partial(getattr, one, name), partial(setattr, one, name), "ieee")
                )
    return settings


class _ArithmeticPrecision:
    """Process-wide precision of float32, counted over the threads that pin it."""

    def __init__(self) -> None:
        self.reset()
        self._settings = _list_settings()

    def reset(self) -> None:
        """Forgets all threads that pin it: a forked child has none."""
        self._lock, self._users = threading.Lock(), 0
        self._before: list[str | bool | None] = []
        self._changed = False

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Pins it; the last thread to leave puts back what the first one found."""
        with self._lock:
            if not self._users:
                self._before = [setting.look() for setting in self._settings]
                self._changed = any(
                    before not in (None, setting.exact)
                    for setting, before in zip(self._settings, self._before, strict=True)
                )
                if self._changed:  # seldom, and reading all of them again takes a while
                    for setting, before in zip(self._settings, self._before, strict=True):
                        setting.put(None if before is None else setting.exact)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._changed:
                    self._restore()

    def _restore(self) -> None:
        """Puts back what was found, but for what somebody else has set in the meantime."""
        pinned = [setting.look() == setting.exact for setting in self._settings]
        for setting, before, pinned_value in zip(self._settings, self._before, pinned, strict=True):
            if pinned_value:
                setting.put(before)


_ARITHMETIC = _ArithmeticPrecision()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ARITHMETIC.reset)
