"""Where an op runs: in the compiled extension, or in its torch twin.

The extension is optional. Without it, for a device it cannot serve, and on the CPU where torch is
as fast, the functions of `torch_twin` do the work; nothing else changes. PROLORA_NATIVE=OFF leaves
the extension alone, ON makes its absence an ImportError.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch  # before the extension, so that both use torch's OpenMP runtime
from torch import Tensor

from ..errors import KernelFailure, ProLoRAError

logger = logging.getLogger(__name__)

INTERFACE = 4
"""What this file expects of the extension: kInterface in csrc/ops.h."""

ON_CPU = {
    "krylov_block": "torch's products are faster on a CPU",
    "overlap_table": "torch's products are faster on a CPU",
    "panel_qr": "torch's products are faster on a CPU",
    "project_pair": "torch's products are faster on a CPU",
    "small_singular_values": "LAPACK is faster on a CPU",
    "small_svd": "",
}
"""The ops, each with the reason why the extension leaves it to torch on a CPU, if it does."""

WITHOUT_TENSOR_CORES = {
    "project_pair": "without fast TF32 no faster than torch by estimate; not measured",
}
"""Why the extension leaves ops to torch on a GPU whose tensor cores they do not use."""

UNMEASURED = {
    "krylov_block": "no card has timed it; PROLORA_KERNELS=krylov_block asks for it",
}
"""Why the extension leaves ops to torch on a GPU unless PROLORA_KERNELS names them."""


@dataclass(frozen=True)
class Choice:
    """What runs an op on a device."""

    kernels: ModuleType | None  # the extension, or None for the torch twin
    why: str = ""  # one clause: the reason for the torch twin
    tensor_cores: bool = False  # do the kernels multiply float32 on the device's tensor cores?


def load_extension() -> Choice:
    """Imports the extension, or says why it is missing.

    Raises:
        ImportError: PROLORA_NATIVE=ON, and it is missing or of another version.
    """
    setting = os.environ.get("PROLORA_NATIVE", "AUTO").upper()
    if setting in ("OFF", "0"):
        return Choice(None, "PROLORA_NATIVE=OFF")
    try:
        extension = importlib.import_module("..._C", __name__)
    except ModuleNotFoundError:
        why = "prolora was installed without it"
    except ImportError as error:
        why = f"it cannot be loaded: {error}"
    else:
        if getattr(extension, "interface", None) == INTERFACE:
            return Choice(extension)
        why = "it was built from other sources than this version's; install prolora again"
    if setting in ("ON", "1"):
        raise ImportError(f"PROLORA_NATIVE=ON, but there is no compiled extension: {why}")
    return Choice(None, why)


EXTENSION = load_extension()


def kernels_fit(capability: tuple[int, int], architectures: str) -> bool:
    """Returns whether kernels compiled for `architectures` run on a card.

    Args:
        capability: compute capability of the card, (major, minor).
        architectures: as CMake lists them, such as "75-real 80 90a-real 120": machine code runs on
            cards of the same major and at least the same minor number, intermediate code (all but
            -real) on that and every later one; with a letter, on that card only ("a"), or within
            its major number ("f").
    """
    for digits, letter, kind in re.findall(r"(\d+)([af]?)(-real|-virtual)?", architectures):
        built = divmod(int(digits), 10)
        same_major = built[0] == capability[0] and built[1] <= capability[1]
        if letter == "a":
            runs = built == capability
        elif letter == "f":
            runs = same_major
        else:
            runs = kind != "-virtual" and same_major
            runs |= kind != "-real" and built <= capability
        if runs:
            return True
    return False


@functools.cache
def _cuda_choices() -> tuple[tuple[Choice, ...], str]:
    """Returns what runs the ops on each CUDA device, and why there is no device."""
    kernels = EXTENSION.kernels
    if kernels is None:
        return (), f"no compiled extension: {EXTENSION.why}"
    if not kernels.cuda_architectures:
        return (), "this build has no CUDA kernels"
    capabilities, why = kernels.cuda_devices()
    built = kernels.cuda_architectures
    choices = [
        Choice(kernels, tensor_cores=kernels.tensor_cores_pay(*capability))
        if kernels_fit(capability, built)
        else Choice(None, "its compute capability {}.{} is not among {}".format(*capability, built))
        for capability in capabilities
    ]
    return tuple(choices), why


def cuda_status() -> tuple[int, str]:
    """Counts the GPUs that run prolora's own kernels; for 0, says why.

    A GPU that torch alone can use is not counted, and works all the same: torch does the work.
    """
    choices, why = _cuda_choices()
    count = sum(choice.kernels is not None for choice in choices)
    if count and not torch.cuda.is_available():
        return 0, "this torch has no CUDA; install a CUDA build of torch"
    if choices and not count:
        return 0, f"device 0: {choices[0].why}"
    return count, why


def require_cuda() -> None:
    """Raises RuntimeError, with the reason, where prolora's kernels can use no GPU."""
    count, why = cuda_status()
    if count == 0:
        raise RuntimeError(f"prolora: no usable CUDA device ({why})")


def require_device(device: torch.device | str) -> None:
    """Checks that a device can do everything a transfer needs.

    Raises:
        RuntimeError: torch cannot use it, or it has no float64.
    """
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        why = cuda_status()[1] or "torch sees none"
        raise RuntimeError(f"prolora: no usable CUDA device ({why})")
    if kind == "mps":
        raise RuntimeError("prolora: device mps has no float64, which the bounds need; use cpu")
    if kind not in ("cpu", "cuda"):
        module = getattr(torch, kind, None)
        if module is None or not hasattr(module, "is_available") or not module.is_available():
            raise RuntimeError(f"prolora: torch cannot use a device of type {kind} here; use cpu")


@functools.cache
def serving(device: torch.device) -> Choice:
    """Returns the choice for a device; logs it once."""
    if device.type == "cpu":
        choice = EXTENSION
    elif device.type != "cuda":
        choice = Choice(None, f"there are no kernels for {device.type}")
    elif torch.version.hip is not None:
        choice = Choice(None, "there are no kernels for ROCm")
    else:
        choices, why = _cuda_choices()
        index = device.index or 0
        choice = choices[index] if index < len(choices) else Choice(None, why)
    if choice.kernels is not None:
        logger.info("%s: the compiled extension runs", device)
    else:
        # Only a warning for a GPU: on a CPU the loss is small.
        level = logging.INFO if device.type == "cpu" else logging.WARNING
        logger.log(level, "%s: torch does the work of the kernels (%s)", device, choice.why)
    return choice


def choose(op: str, device: torch.device) -> Choice:
    """Returns what runs an op on a device.

    Raises:
        ProLoRAError: PROLORA_KERNELS names an unknown op.
    """
    asked = is_asked(op)
    choice = serving(device)
    if asked and device.type != "cpu" and choice.kernels is None:
        _warn_unheeded(op, device, choice.why)
    if device.type == "cpu" and choice.kernels is not None and ON_CPU[op]:
        return Choice(None, ON_CPU[op])
    if device.type == "cuda" and choice.kernels is not None and not asked:
        if op in UNMEASURED:
            return Choice(None, UNMEASURED[op])
    if device.type == "cuda" and choice.kernels is not None and not choice.tensor_cores:
        why = WITHOUT_TENSOR_CORES.get(op, "")
        return Choice(None, why) if why else choice
    return choice


@functools.cache
def _warn_unheeded(op: str, device: torch.device, why: str) -> None:
    logger.warning("%s: PROLORA_KERNELS names %s, but torch does its work (%s)", device, op, why)


def is_asked(op: str) -> bool:
    """Returns whether PROLORA_KERNELS (ops with commas between them) names this op.

    Raises:
        ProLoRAError: it names an unknown op.
    """
    words = os.environ.get("PROLORA_KERNELS", "").split(",")
    names = [word.strip() for word in words if word.strip()]
    unknown = sorted(set(names) - ON_CPU.keys())
    if unknown:
        raise ProLoRAError(f"PROLORA_KERNELS names {unknown}, but the ops are {sorted(ON_CPU)}")
    return op in names


def kernels_for(op: str, device: torch.device) -> ModuleType | None:
    """Returns the extension if it runs an op on a device; None for the torch twin."""
    return choose(op, device).kernels


def describe_installation() -> dict[str, str | int]:
    """Lists the parts of the extension and what runs each op, to print."""
    kernels = EXTENSION.kernels
    count, why = cuda_status()
    facts: dict[str, str | int] = {
        "compiled extension": "yes" if kernels else f"no ({EXTENSION.why})",
        "CUDA kernels": (kernels.cuda_architectures if kernels else "") or "none",
        "GPUs that run the kernels": f"0 ({why})" if count == 0 else count,
    }
    cards = [torch.device("cuda", i) for i, c in enumerate(_cuda_choices()[0]) if c.kernels]
    for op in ON_CPU:
        on_cpu = choose(op, torch.device("cpu"))
        cpu = f"torch ({on_cpu.why})" if on_cpu.kernels is None else "extension"
        on_gpu = choose(op, cards[0]) if count else Choice(None)
        why = f" ({on_gpu.why})" if on_gpu.why else ""
        gpu = f"torch{why}" if on_gpu.kernels is None else "extension"
        facts[f"op {op}"] = f"cpu: {cpu}; gpu: {gpu}"
    return facts


def run_kernel(
    kernels: ModuleType,
    op: str,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    cuda: bool,
    float64: bool | None = None,
) -> None:
    """Runs an op of `kernels` (the extension, or the emulator in tests).

    Args:
        kernels: has `run`.
        op: its name.
        tensors: contiguous, on one device, in the order of the op's struct in csrc/ops.h.
        sizes: follow the tensors there.
        cuda: whether to run the kernel; the tensors' device says where the memory is, and differs
            from it in the emulator only.
        float64: the precision; None means the first tensor's.

    Raises:
        KernelFailure: it did not run; PROLORA_NATIVE=OFF leaves the work to torch.
    """
    like = tensors[0]
    float64 = like.dtype == torch.float64 if float64 is None else float64
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    with on_device(like):
        numbers = [*(x.data_ptr() for x in tensors), *sizes]
        try:
            kernels.run(op, numbers, float64, cuda, stream)
        except RuntimeError as error:
            raise KernelFailure(
                f"a kernel did not run: {error}; PROLORA_NATIVE=OFF leaves the work to torch"
            ) from error


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of x the current one, as the kernels expect."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
