"""Where an op runs: in the compiled extension, or in its torch twin.

The extension is optional. Without it, for a device it cannot serve, and where torch is as fast, the
twins do the work; nothing else changes. PROLORA_NATIVE=OFF leaves the extension alone, ON makes its
absence an ImportError.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch  # before the extension, so that both use torch's OpenMP runtime
from torch import Tensor

from ..exceptions import KernelFailure
from . import trial
from .trial import describe_card, list_choices

logger = logging.getLogger(__name__)

INTERFACE = "6c2f68dedd05"
"""The first digits of the SHA-256 of csrc/ops.h that this Python side was written for."""

# How far a kernel's result may be from torch's, relative to its norm, in float64 and float32.
FAR, FAR_32 = 1e-10, 1e-4


@dataclass(frozen=True)
class Op:
    """An op: in the extension, and in torch, which runs where the extension does not."""

    run: Callable[..., Any]  # takes the extension, the operands, and whether the kernels are CUDA's
    twin: Callable[..., Any]  # takes the operands
    compared: Callable[[Any], Sequence[Tensor]] = list  # makes what is equal up to rounding
    far: float | None = None  # how far it may be, unless the dtype says
    on_cpu: str = ""  # why torch does it on a CPU, if it does


PRODUCTS = "torch's products are faster on a CPU"

OPS: dict[str, Op] = {}
"""Every op by its name; each file of this folder adds its own."""


@dataclass(frozen=True)
class Choice:
    """What runs an op on a device."""

    kernels: ModuleType | None  # the extension, or None for the torch twin
    why: str = ""  # one clause: the reason for the torch twin
    cuda: bool = False  # are the kernels those for CUDA, of which a trial decides?


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


def require_extension() -> ModuleType:
    """Returns the extension, for what only it can do."""
    if EXTENSION.kernels is None:
        raise KernelFailure(EXTENSION.why)
    return EXTENSION.kernels


def kernels_fit(capability: tuple[int, int], architectures: str) -> bool:
    """Returns whether kernels compiled for `architectures` run on a card.

    `architectures` as CMake lists them, such as "75-real 80 90a-real 120": machine code runs on
    cards of the same major and at least the same minor number, intermediate code (all but -real) on
    that and every later one; with a letter, on that card only ("a"), or within its major number
    ("f").
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
        Choice(kernels, cuda=True)
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


def require_device(device: torch.device | str) -> None:
    """Checks that a device can do everything a transfer needs.

    Raises:
        RuntimeError: torch cannot use it, or it has no float64.
    """
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        why = "torch sees none; use cpu, or install its build for CUDA and NVIDIA's driver"
        raise RuntimeError(f"prolora: no usable CUDA device: {why}")
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
    """Returns what runs an op on a device; a trial may yet decide against CUDA's kernels."""
    choice = serving(device)
    if choice.kernels is not None and not choice.cuda and OPS[op].on_cpu:
        return Choice(None, OPS[op].on_cpu)
    return choice


def run_best(name: str, like: Tensor, sizes: Sequence[int], *operands: Any) -> Any:
    """Runs an op by the extension or by its torch twin.

    CUDA's kernels have to win a trial of operands of these sizes first.
    """
    choice, op = choose(name, like.device), OPS[name]
    torchs = partial(op.twin, *operands)
    if choice.kernels is None:
        return torchs()
    mine = partial(op.run, choice.kernels, *operands, choice.cuda)
    if choice.cuda:
        far = op.far or (FAR if like.dtype == torch.float64 else FAR_32)
        both = (lambda: op.compared(mine())), (lambda: op.compared(torchs()))
        if not trial.prefers_kernel(name, like, sizes, both, far, choice.kernels.sources):
            return torchs()
    return mine()


def fingerprint() -> str:
    """Returns what the bits of a result depend on beside the machine's CPU: "" without own kernels.

    Two machines with the same card chose alike, or PROLORA_NATIVE=OFF makes both use torch.
    """
    cards = [torch.device("cuda", i) for i, c in enumerate(_cuda_choices()[0]) if c.kernels]
    if not cards or not torch.cuda.is_available():
        return ""
    return f" kernels {INTERFACE} on {describe_card(cards[0])}"


def describe_installation() -> dict[str, str | int]:
    """Lists the parts of the extension and what runs each op, to print."""
    kernels = EXTENSION.kernels
    count, why = cuda_status()
    facts: dict[str, str | int] = {
        "compiled extension": "yes" if kernels else f"no ({EXTENSION.why})",
        "CUDA kernels": (kernels.cuda_architectures if kernels else "") or "none",
        "GPUs that run the kernels": f"0 ({why})" if count == 0 else count,
    }
    for op in OPS:
        on_cpu = choose(op, torch.device("cpu"))
        cpu = f"torch ({on_cpu.why})" if on_cpu.kernels is None else "extension"
        gpu = "what wins a trial at first use" if count else "torch"
        facts[f"op {op}"] = f"cpu: {cpu}; gpu: {gpu}"
    facts["leading eigenpairs"] = f"cpu: {'extension' if kernels else 'torch'}; gpu: torch"
    for tried, (wins, why) in sorted(list_choices().items()):
        facts[f"trial of {tried}"] = f"{'extension' if wins else 'torch'} ({why})"
    return facts


def run_kernel(
    kernels: ModuleType,
    op: str,
    cuda: bool,
    float64: bool,
    tensors: Mapping[str, Tensor | None],
    sizes: dict[str, int],
) -> None:
    """Runs an op of `kernels` (the extension, or the emulator in tests).

    The tensors are contiguous, on one device, and with the sizes behind them the fields of the op's
    struct in csrc/ops.h, in their order. `cuda` says whether to run the kernel: the tensors' device
    differs from it in the emulator. None is a null pointer.

    Raises:
        KernelFailure: it did not run; PROLORA_NATIVE=OFF leaves the work to torch.
    """
    like = next(x for x in tensors.values() if x is not None)
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    with on_device(like):
        addresses = [0 if x is None else x.data_ptr() for x in tensors.values()]
        numbers = [*addresses, *sizes.values()]
        try:
            kernels.run(op, numbers, float64, cuda, stream)
        except RuntimeError as error:
            raise KernelFailure(
                f"a kernel did not run: {error}; PROLORA_NATIVE=OFF leaves the work to torch"
            ) from error


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of x the current one, as the kernels expect."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
