"""The two models of a probing: what it can handle, and how they are kept still meanwhile."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..errors import NonFiniteWeights, ProLoRAError
from .fit_precision import HALVES
from .updates import weight_of

LARGEST = 1e15
"""Of all weights: what larger ones make has squares and sums beyond float32."""


def check_models(source: nn.Module, target: nn.Module, adapter: Adapter) -> None:
    """Refuses what probing cannot handle, before anything is sampled."""
    if not adapter.updates:
        raise ProLoRAError("the LoRA has no updates")
    for side, model in (("source", source), ("target", target)):
        for name, parameter in model.named_parameters():
            if parameter.dtype not in (torch.float32, *HALVES):
                raise ProLoRAError(
                    f"{name} of the {side} is {parameter.dtype}: a fit computes in float32 from "
                    "weights of float32, float16 or bfloat16; call .float() on the model"
                )
        check_weights(model, f"the {side}")
    for name, update in adapter.updates.items():
        weight_of(source, name, any_kind=True)
        for factor in (update.up, update.down):
            _check_tensor(factor, f"the LoRA's update of {name}")


def check_weights(model: nn.Module, where: str) -> None:
    """Refuses a model with which every sampling would end in NaN, naming the tensor."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            # A stored mask may well hold -Inf.
            _check_tensor(tensor, f"{name} of {where}", LARGEST if name in parameters else math.inf)


def _check_tensor(tensor: Tensor, name: str, largest: float = LARGEST) -> None:
    if not tensor.numel():
        return
    values = tensor.detach()
    values = values.float() if values.dtype.itemsize == 1 else values  # float8 has no arithmetic
    low, high = (float(x) for x in torch.aminmax(values))
    if not (-largest <= low and high <= largest):  # NaN is in no order
        bad = torch.nonzero(~(values.abs() <= largest))
        raise NonFiniteWeights(
            f"{name}: {len(bad)} of {values.numel()} values are NaN, Inf or above {LARGEST:g}, the "
            f"first at {bad[0].tolist()}; the weights are damaged: download the file again"
        )


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients of parameters.

    Until the end of the block.
    """
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
