"""Updates beside the weights of a running model, by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.lowrank import LowRank
from ..errors import ProLoRAError, ShapeMismatch
from .swapping import compute_device


@contextlib.contextmanager
def temporary_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes registered hooks at the end of the block, also where it raises."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


Factors = dict[str, tuple[Tensor, Tensor]]
"""Module -> (B [m, r], A [r, n]): the factors of an update, their gradients or their changes."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextlib.contextmanager
def with_lora(
    model: nn.Module, updates: Mapping[str, LowRank], strength: float = 1.0
) -> Iterator[None]:
    """Runs the model with updates beside its weights, which do not change.

    Of every module y = W·x it adds B·(A·x) to y, so that nothing is of a weight's size. Inside
    `in_float32` that is the sum in float32, whatever the weights are stored in.

    `updates` are module -> B·A [m, n]; for a convolution n is its flattened weight's.
    """
    factors = {}
    for name, update in updates.items():
        weight = weight_of(model, name, any_kind=True)
        if weight.flatten(1).shape != update.shape:
            raise ShapeMismatch(
                f"the update of {name} is {list(update.shape)}, its weight {list(weight.shape)}"
            )
        up, down = (
            part.to(compute_device(weight), torch.float32) for part in (update.up, update.down)
        )
        factors[name] = (up if strength == 1 else strength * up), down
    with place_factors(model, factors):
        yield


@contextlib.contextmanager
def place_factors(
    model: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    move: Callable[[str], tuple[Tensor, Tensor]] | None = None,
) -> Iterator[None]:
    """Acts as `with_lora` for fitting factors that may need gradients.

    `move` gives other factors of a module, whenever it runs.
    """
    hooks = []
    for name, pair in factors.items():
        module = model.get_submodule(name)
        take = partial(move, name) if move else partial(tuple[Tensor, Tensor], pair)
        hooks.append(module.register_forward_hook(_adder(module, take), with_kwargs=True))
    with temporary_hooks(hooks):
        yield


def _adder(module: nn.Module, take: Callable[[], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def make(x: Tensor) -> Tensor:
        up, down = take()
        if isinstance(module, nn.Embedding):
            return F.embedding(x, up) @ down
        if isinstance(module, _CONVOLUTIONS):
            seen = _convolve(module, down, x)
            made: Tensor = F.conv1d(seen.flatten(2), up[..., None], groups=module.groups)
            return made.reshape(*made.shape[:2], *seen.shape[2:])
        return (x @ down.mT) @ up.mT

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        return y + make(input_of(args, kwargs))

    return add


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the one tensor that a module is called with, named or not."""
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    return given


def _convolve(module: nn.Module, down: Tensor, x: Tensor) -> Tensor:
    """Convolves x with the rows of `down` as kernels, in every group.

    The module's own forward runs, since some pad x before.
    """
    parameters: dict[str, Any] = module._parameters
    stored = dict(parameters)
    axes = stored["weight"].dim() - 1
    kernels = down.unflatten(1, stored["weight"].shape[1:])
    try:
        parameters["weight"] = kernels.repeat(module.groups, *[1] * axes)
        parameters["bias"] = None
        seen: Tensor = module.forward(x)
    finally:
        parameters.update(stored)
    return seen


def read_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Returns what a module multiplies its weight with, as rows [..., n].

    For a convolution these are its patches.
    """
    if not isinstance(module, nn.Conv2d):
        return x
    padding: Any = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        sides: Any = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, sides, mode), 0
    kernel: Any = module.kernel_size
    dilation: Any = module.dilation
    return F.unfold(x, kernel, dilation, padding, cast(Any, module.stride)).mT


def written_rows(module: nn.Module, y: Tensor) -> Tensor:
    """Returns a module's output, or its gradient, as rows [..., m]."""
    return y.movedim(1, -1) if isinstance(module, nn.Conv2d) else y


def can_be_fitted(module: nn.Module) -> bool:
    """Returns whether a fit changes such modules: linear layers, image convolutions."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    weight = getattr(module, "weight", None)
    return hasattr(module, "in_features") and isinstance(weight, Tensor) and weight.dim() == 2


def weight_of(model: nn.Module, name: str, any_kind: bool = False) -> Tensor:
    """Returns the weight of a module that a fit can change.

    `any_kind` also takes any convolution or an embedding.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ProLoRAError(
            f"the model has no module {name}; pass the module that the LoRA's names start from"
        ) from error
    weight = getattr(module, "weight", None)
    other = any_kind and isinstance(module, (*_CONVOLUTIONS, nn.Embedding))
    if not isinstance(weight, Tensor) or not (other or can_be_fitted(module)):
        raise ProLoRAError(
            f"{name} is a {type(module).__name__}; a fit changes linear layers, and convolutions "
            "of images that are not in groups"
        )
    return weight
