"""The blocks of a diffusion model, whose outputs are its residual streams."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ProLoRAError
from ..hooks import capture_first_call, keep_hooks
from ..recording.trajectories import Call

Streams = tuple[Tensor, ...]
"""Outputs of one block, each [n, tokens, width]: one in UNets, text and image in FLUX."""


def as_streams(output: Any) -> Streams:
    """The return value of a block as a tuple of streams."""
    if isinstance(output, Tensor):
        return (output,)
    return tuple(stream for stream in output if isinstance(stream, Tensor))  # SD3 ends without text


@torch.no_grad()
def read_streams(model: nn.Module, names: Collection[str], call: Call) -> dict[str, Streams]:
    """The outputs of the named blocks during one call."""
    streams: dict[str, Streams] = {}

    def keep(name: str, output: Any) -> None:
        streams[name] = as_streams(output)

    hooks = (
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: keep(name, output)
        )
        for name in names
    )
    with keep_hooks(hooks):
        model(*call.args, **call.kwargs)
    return streams


@torch.no_grad()
def capture_inputs(model: nn.Module, name: str, call: Call) -> Call:
    """The inputs of a block during one call of the model; the pass ends there.

    Raises:
        ProLoRAError: the model does not run the block.
    """
    inputs = capture_first_call(model.get_submodule(name), lambda: model(*call.args, **call.kwargs))
    if inputs is None:
        raise ProLoRAError(f"{type(model).__name__} did not run its block {name}")
    return Call(*inputs, call.origin)
