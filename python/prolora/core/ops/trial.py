"""Whether a kernel or torch does an op on a card: tried on the caller's own operands, and kept.

The first call of an op with operands of a size on a card runs both ways, compares what they give
and times them in turn. The choice is kept in a file, so that the next process gives the same bits.
A kernel that fails, differs or is no faster loses, and the log says why.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..exceptions import KernelFailure

logger = logging.getLogger(__name__)

Way = Callable[[], Sequence[Tensor]]
"""Does the op on operands of its own, and returns what is to be compared."""

INTERFACE = 5
"""What the Python side expects of the extension: kInterface in csrc/ops.h."""

# The kernel must take this share of torch's time or less, so that no trial comes out otherwise.
CLEARLY_FASTER = 0.9
REPEATS = 3

_known: dict[str, tuple[bool, str]] | None = None
_lock = threading.RLock()  # a trial of one op may run another


def prefers_kernel(
    op: str, like: Tensor, sizes: Sequence[int], ours: Way, torchs: Way, far: float
) -> bool:
    """Returns whether the kernel does an op of about these sizes; tries it the first time.

    `like` has the card and the dtype that matter, `sizes` tell by powers of two one trial from
    another, and results may differ by `far` of their norm.
    """
    device = like.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False  # a graph can neither be timed nor waited for
    rounded = "×".join(str(1 << max(0, size - 1).bit_length()) for size in sizes)
    dtype = str(like.dtype).removeprefix("torch.")
    key = f"{op} {dtype} {rounded} on {describe_card(device)}"
    with _lock:
        known = list_choices()
        if key not in known:
            known[key] = _try(ours, torchs, far, device)
            wins, why = known[key]
            level = logging.INFO if " s over " in why else logging.WARNING
            logger.log(level, "%s: by %s (%s)", key, "the kernel" if wins else "torch", why)
            _write(known)
        return known[key][0]


def _try(ours: Way, torchs: Way, far: float, device: torch.device) -> tuple[bool, str]:
    """Returns whether the kernel wins, and why."""
    try:
        for found, wanted in zip(ours(), torchs(), strict=True):
            error = torch.linalg.vector_norm((found - wanted).double())
            allowed = far * torch.linalg.vector_norm(wanted.double())
            if not bool(error <= allowed):  # NaN too
                return False, f"off by {float(error):.1e}, more than {float(allowed):.1e}"
        pairs = [(take_time(ours, device), take_time(torchs, device)) for _ in range(REPEATS)]
    except (KernelFailure, torch.OutOfMemoryError) as error:
        return False, f"it fails: {error}"
    mine, theirs = (min(times) for times in zip(*pairs, strict=True))
    return mine <= CLEARLY_FASTER * theirs, f"{mine:.1e} s over {theirs:.1e} s"


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


def list_choices() -> dict[str, tuple[bool, str]]:
    """Reads what was chosen so far: whether the kernel, and why."""
    global _known
    if _known is None:
        try:
            text = _path().read_text("utf-8")
            _known = {key: (bool(wins), str(why)) for key, (wins, why) in json.loads(text).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            _known = {}
    return _known


def _path() -> Path:
    home = Path(os.environ.get("PROLORA_CACHE") or Path.home() / ".cache" / "prolora").expanduser()
    return home / f"kernels-{INTERFACE}.json"


def _write(known: dict[str, tuple[bool, str]]) -> None:
    """Keeps the choices for the next process; where they cannot be kept, that one tries again."""
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        part = _path().with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(known, indent=1), "utf-8")
        part.replace(_path())
    except OSError as error:
        logger.info("%s: %s", _path(), error)
