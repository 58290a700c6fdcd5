"""Which tensors and devices the mathematics takes: everything else is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor
from torch.autograd.forward_ad import unpack_dual

from .exceptions import NoDerivative, UnsupportedDevice, UnsupportedTensor
from .ops import native

DeviceLike = torch.device | str | None
"""A device, as torch has it or calls it; "auto" is a GPU that torch can use, or else the CPU."""


def check_device(device: DeviceLike) -> torch.device:
    """Returns the device to compute on, the CPU for None.

    Raises:
        UnsupportedDevice: torch does not know it, prolora does not compute on it, or this machine
            has none.
    """
    try:
        wanted = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError, ValueError) as error:
        message = f"no device is called {device!r}: use auto, cpu, cuda or cuda:1"
        raise UnsupportedDevice(message) from error
    try:
        native.require_device(wanted)
    except RuntimeError as error:
        raise UnsupportedDevice(str(error)) from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UnsupportedDevice(f"there is no {wanted}: this machine has {count} CUDA devices")
    return wanted


def resolve_device(device: DeviceLike) -> str:
    """Returns the checked device: for "auto" and None a GPU if present.

    Raises:
        UnsupportedDevice: as `check_device`.
    """
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return str(check_device(device))


def check_layout(name: str, tensor: Tensor) -> None:
    """Refuses tensors that are not plain real matrices in memory.

    Raises:
        UnsupportedTensor: nested, sparse, quantised or complex; says which tensor it is.
    """
    if tensor.is_nested:
        raise UnsupportedTensor(f"{name} is a nested tensor: give a padded or a single one")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise UnsupportedTensor(f"{name} is {layout}: give {name}.to_dense()")
    if tensor.is_quantized:
        raise UnsupportedTensor(f"{name} is quantised: give {name}.dequantize()")
    if tensor.is_complex():
        raise UnsupportedTensor(f"{name} is {tensor.dtype}: singular subspaces here are real")


def check_operand(name: str, tensor: Tensor) -> None:
    """Refuses what cannot be computed with.

    Raises:
        UnsupportedTensor: not a dense tensor of floating-point numbers, or one without data.
        UnsupportedDevice: see `check_device`.
    """
    check_layout(name, tensor)
    if tensor.is_meta:
        raise UnsupportedTensor(f"{name} is on the meta device: it has a shape but no numbers")
    if not tensor.is_floating_point():
        raise UnsupportedTensor(f"{name} is {tensor.dtype}: give floating-point numbers")
    try:
        check_device(tensor.device)
    except UnsupportedDevice as error:
        raise UnsupportedDevice(f"{name} is on {tensor.device}: {error}") from error


def without_gradient(what: str, name: str, tensor: Tensor) -> Tensor:
    """Returns the tensor detached, as a module's weight may be; refuses one of a graph.

    Raises:
        NoDerivative: a derivative with respect to it, forward or reverse, would be lost.
    """
    refuse_tangents(f"{what} with respect to {name}", tensor)
    in_a_graph = not tensor.is_leaf or is_gradtrackingtensor(tensor)
    if torch.is_grad_enabled() and tensor.requires_grad and in_a_graph:
        raise NoDerivative(
            f"{what} has no gradient with respect to {name}: give {name}.detach(), or call it "
            "under torch.no_grad()"
        )
    return tensor.detach()


def refuse_tangents(what: str, *tensors: Tensor) -> None:
    """Refuses tensors with a forward-mode derivative, which would be lost.

    Raises:
        NoDerivative: `what` has no derivative here.
    """
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NoDerivative(f"{what} has no forward-mode derivative: torch.no_grad() first")


@contextmanager
def refuse_vmap(function: str) -> Iterator[None]:
    """Decorates a function that looks at numbers: says why vmap fails.

    Raises:
        UnsupportedTensor: torch.func.vmap, which hides the numbers, is at work.
    """
    try:
        yield
    except RuntimeError as error:
        # The second is what `tolist` says there; tensors of other kinds without data are refused
        # before anything looks at their numbers.
        hidden = str(error).startswith("vmap:") or "doesn't have storage" in str(error)
        if not hidden:
            raise
        raise UnsupportedTensor(
            f"{function} cannot run under torch.func.vmap, which hides the numbers that it must "
            "look at; give it stacks: it takes [b, m, n] as it takes [m, n]"
        ) from error
