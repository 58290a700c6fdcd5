"""Where the residual stream of a diffusion model can be read: the outputs of its blocks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ProLoRAError
from .trajectories import Call

BLOCK_CLASSES = ("BasicTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
"""Class names of the blocks whose outputs are residual streams."""

Streams = tuple[Tensor, ...]
"""One block's outputs, each [n, tokens, width]: UNets have one, FLUX text and image."""


class _ReachedBlock(Exception):
    """Ends a forward pass at the block whose inputs are wanted."""


def find_blocks(model: nn.Module, call: Call) -> list[str]:
    """The names of a model's blocks, in the order in which they run.

    Raises:
        ProLoRAError: the model has no block of a known class.
    """
    order: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if type(module).__name__ in BLOCK_CLASSES
    ]
    try:
        with torch.no_grad():
            model(*call.args, **call.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if not order:
        raise ProLoRAError(
            f"{type(model).__name__} has no block that probing knows ({', '.join(BLOCK_CLASSES)})"
        )
    return order


def as_streams(output: Any) -> Streams:
    """A block's return value as a tuple of streams."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


@torch.no_grad()
def read_streams(model: nn.Module, names: Collection[str], call: Call) -> dict[str, Streams]:
    """The outputs of the named blocks during one call."""
    found: dict[str, Streams] = {}

    def keep(name: str, output: Any) -> None:
        found[name] = as_streams(output)

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: keep(name, output)
        )
        for name in names
    ]
    try:
        model(*call.args, **call.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def inputs_of(model: nn.Module, name: str, call: Call) -> Call:
    """What a block is called with during one call of the model; the pass ends there."""
    reached: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append(Call(args, kwargs, call.origin))
        raise _ReachedBlock

    hook = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(*call.args, **call.kwargs)
    except _ReachedBlock:
        pass
    finally:
        hook.remove()
    return reached[0]
