"""The two models of a probing: what it can handle, and how they are kept still meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..errors import ProLoRAError
from .precision import HALVES
from .updates import weight_of


def check_models(source: nn.Module, target: nn.Module, adapter: Adapter) -> None:
    """Refuses what probing cannot handle, before anything is sampled.

    Raises:
        ProLoRAError: no updates, a dtype other than those of HALVES and float32, or no such module.
    """
    if not adapter.updates:
        raise ProLoRAError("the LoRA has no updates")
    for side, model in (("source", source), ("target", target)):
        for name, parameter in model.named_parameters():
            if parameter.dtype not in (torch.float32, *HALVES):
                raise ProLoRAError(
                    f"{name} of the {side} is {parameter.dtype}: probing computes in float32 from "
                    "weights of float32, float16 or bfloat16; call .float() on the model"
                )
    for name in adapter.updates:
        weight_of(source, name, convolution=True)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients of parameters, until the end of the block."""
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)
