"""Whether a kernel or torch does an op on a card: tried on the caller's own operands.

The first call of an op with operands of a size on a card runs both ways, compares what they give
and times them in turn. The choice stays in memory, and where `keep_choices` puts it, so that the
next process gives the same bits. A kernel that fails, differs or is no faster loses, and the log
says why; one that lacked memory is tried again. Before the first trial on a card the kernels run in
a process of their own, which a fault may end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..exceptions import KernelFailure
from . import child

logger = logging.getLogger(__name__)

Way = Callable[[], Sequence[Tensor]]
"""Does the op on operands of its own, and returns what is to be compared."""

# The kernel must take this share of torch's time or less, so that no trial comes out otherwise.
CLEARLY_FASTER = 0.9
REPEATS = 3

NOT_RUN = "its kernels have not run in a process of their own: no memory, or no process"

_choices: dict[str, tuple[bool, str]] = {}
# Of a card, its driver and the version of the kernels: the ops that ran in a process of their own,
# each with the reason why it fails, or "".
_probes: dict[str, dict[str, str]] = {}
_read: Callable[[str], Any] = _choices.get
_write: Callable[[str, Any], object] = _choices.setdefault
_lock = threading.RLock()  # a trial of one op may run another


def prefers_kernel(
    op: str, like: Tensor, sizes: Sequence[int], ways: tuple[Way, Way], far: float, sources: str
) -> bool:
    """Returns whether the kernel does an op of about these sizes; tries it the first time.

    `like` has the card and the dtype that matter, `sizes` tell by powers of two one trial from
    another, and results may differ by `far` of their norm. ways: the kernel's and torch's; sources:
    the version of the kernels: mended ones are tried again.
    """
    device = like.device
    rounded = "×".join(str(1 << max(0, size - 1).bit_length()) for size in sizes)
    dtype = str(like.dtype).removeprefix("torch.")
    place = f"on {describe_card(device)}, kernels {sources}"
    key = f"{op} {dtype} {rounded} {place}"
    with _lock:
        match _read(key):
            case [bool(wins), str(why)] if key not in _choices:
                _choices[key] = wins, why
        if key not in _choices:
            if is_capturing(device):
                return False  # a graph can neither be timed nor waited for
            fault = _find_fault(op, device, place)
            try:
                choice = (False, fault) if fault else _try(*ways, far, device)
            except torch.cuda.OutOfMemoryError as error:
                choice = False, str(error)
            if choice[1] == NOT_RUN or child.lacks_memory(choice[1]):
                logger.warning("%s: by torch this time (%s)", key, choice[1])
                return False
            _choices[key] = wins, why = choice
            level = logging.INFO if " s over " in why else logging.WARNING
            logger.log(level, "%s: by %s (%s)", key, "the kernel" if wins else "torch", why)
            _write(key, list(choice))
        return _choices[key][0]


def _find_fault(op: str, device: torch.device, place: str) -> str:
    """Returns why the kernels of an op fail in a child process, or ""."""
    if place not in _probes:
        match _read(place):
            case dict() as results:
                _probes[place] = {str(name): str(why) for name, why in results.items()}
            case _:
                logger.info("%s: their first run, in a process of their own", place)
                _probes[place], complete = child.probe_ops(str(device))
                if complete:
                    _write(place, _probes[place])
    why = _probes[place].get(op)
    return NOT_RUN if why is None else why and f"it fails in a process of its own: {why}"


def is_capturing(device: torch.device) -> bool:
    """Returns whether a graph records what is called now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep_choices(read: Callable[[str], Any], write: Callable[[str, Any], object]) -> None:
    """Reads choices from elsewhere from now on, and writes new ones there."""
    global _read, _write
    with _lock:
        _read, _write = read, write


def list_choices() -> dict[str, tuple[bool, str]]:
    """Lists what this process has chosen so far: whether the kernel, and why."""
    return dict(_choices)


def _try(op: Way, twin: Way, far: float, device: torch.device) -> tuple[bool, str]:
    """Returns whether the kernel wins, and why."""
    try:
        for computed, wanted in zip(op(), twin(), strict=True):
            error = torch.linalg.vector_norm((computed - wanted).double())
            allowed = far * torch.linalg.vector_norm(wanted.double())
            if not bool(error <= allowed):  # NaN too
                return False, f"off by {float(error):.1e}, more than {float(allowed):.1e}"
        pairs = [(take_time(op, device), take_time(twin, device)) for _ in range(REPEATS)]
    except KernelFailure as error:
        return False, f"it fails: {error}"
    op_time, twin_time = (min(times) for times in zip(*pairs, strict=True))
    return op_time <= CLEARLY_FASTER * twin_time, f"{op_time:.1e} s over {twin_time:.1e} s"


def take_time(way: Callable[[], object], device: torch.device) -> float:
    """Measures the seconds of a call, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def describe_card(device: torch.device) -> str:
    """Describes the card, its driver and torch."""
    if device.type != "cuda":
        return f"{device.type}, torch {torch.__version__}"
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "")()
    name = torch.cuda.get_device_name(device)
    return f"{name}, driver {driver}, torch {torch.__version__}"
