"""The two models of a fit: what it can handle, frozen, in which precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..core.lowrank import LowRank
from ..core.parallel import limit_threads
from ..errors import NonFiniteWeights, ProLoRAError
from .settings import BFLOAT16, FLOAT32, Precision
from .updates import weight_of

HALVES = (torch.float16, torch.bfloat16)
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What autocast runs in 16 bits, so that its weights are needed as they are stored."""


def _widen_halves(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALVES else value
    if isinstance(value, dict):
        widened = {key: _widen_halves(item) for key, item in value.items()}
        return widened if type(value) is dict else type(value)(**widened)  # what diffusers returns
    if isinstance(value, list | tuple):
        return type(value)(_widen_halves(item) for item in value)
    return value


class _WidenedModule:
    """The hooks of one module, which is in float32 while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.stored: dict[str, Any] = {}

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # As functional_call does: another tensor under the parameter's name. Autograd saves that
        # tensor, so the graph is not affected when the stored one comes back.
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype in HALVES:
                self.stored[name] = parameter
                module._parameters[name] = parameter.detach().float()  # type: ignore[assignment]
        return _widen_halves(args), _widen_halves(kwargs)

    def after(self, module: nn.Module, *_: Any) -> None:
        for name, parameter in self.stored.items():
            module._parameters[name] = parameter
        self.stored = {}


class _AutocastModel:
    """The hooks of a whole model, which runs inside autocast; what is outside of it does not.

    Blocks that are computed again in the backward pass run as they did before.
    """

    def __init__(self) -> None:
        self.entered: list[torch.autocast] = []

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        device = next(model.parameters()).device.type
        # Without its cache, since casts of the LoRA's factors must not outlive a pass.
        autocast = torch.autocast(device, torch.bfloat16, cache_enabled=False)
        autocast.__enter__()
        self.entered.append(autocast)

    def after(self, model: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        if self.entered:  # nothing was, where another hook ended the call before
            self.entered.pop().__exit__(None, None, None)
        return _widen_halves(result)


@contextmanager
def in_precision(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Runs the model on float32, computed in float32 or by autocast in bfloat16.

    In float32, the weights stay in half precision, and each layer's are float32 while it runs. So
    the results are `model.float()`'s, in half the memory. Weights in float32 are not touched.

    In bfloat16, products and convolutions run in 16 bits, those in updates beside the weights too,
    and all else as in float32: times and noise levels are not rounded. Weights in float16 are
    rounded on the way. float16 itself is not offered: sums of gradients over an image pass its
    largest number, 65504. On the icons bfloat16 reaches 0.01 less (docs/results.md), so that "auto"
    is float32 where no bound on a card's memory asks for more room.
    """
    narrow = precision == BFLOAT16
    with ExitStack() as hooks:

        def register(module: nn.Module, hook: _WidenedModule | _AutocastModel) -> None:
            pre = module.register_forward_pre_hook(hook.before, with_kwargs=True, prepend=True)
            post = module.register_forward_hook(hook.after, always_call=True)
            hooks.callback(pre.remove)
            hooks.callback(post.remove)

        if narrow:
            register(model, _AutocastModel())
        for module in model.modules():
            half = any(p is not None and p.dtype in HALVES for p in module._parameters.values())
            inside = half and not (narrow and isinstance(module, _PRODUCTS))
            if inside or (module is model and any(p.dtype in HALVES for p in model.parameters())):
                register(module, _WidenedModule(module))
        yield


def in_float32(model: nn.Module) -> AbstractContextManager[None]:
    """Runs the model in float32."""
    return in_precision(model, FLOAT32)


LARGEST = 1e15
"""Of all weights: what larger ones make has squares and sums beyond float32."""


def suited_threads(models: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Runs small models on one thread: see `limit_threads`.

    Large ones keep torch's number of threads, and so do models on a GPU.
    """
    weights = [p for model in models for p in model.parameters() if p.ndim > 1]
    if any(weight.device.type != "cpu" for weight in weights):
        return nullcontext()
    return limit_threads(max((weight.numel() for weight in weights), default=0))


def check_models(source: nn.Module, target: nn.Module, updates: Mapping[str, LowRank]) -> None:
    """Refuses what no fit can handle, before anything is sampled."""
    if not updates:
        raise ProLoRAError("the LoRA has no updates")
    for side, model in (("source", source), ("target", target)):
        for name, parameter in model.named_parameters():
            if parameter.dtype not in (torch.float32, *HALVES):
                raise ProLoRAError(
                    f"{name} of the {side} is {parameter.dtype}: a fit computes in float32 from "
                    "weights of float32, float16 or bfloat16; call .float() on the model"
                )
        check_weights(model, f"the {side}")
    for name, update in updates.items():
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


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients of parameters, within the block."""
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
