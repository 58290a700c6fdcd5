"""Models stored in half precision and computed in float32, one layer's weights at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


def _widen_halves(value: Any) -> Any:
    """Half-precision tensors as float32, in nested containers too."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALVES else value
    if isinstance(value, dict):
        return {key: _widen_halves(item) for key, item in value.items()}
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


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """The model takes and returns float32, and computes in it, whatever dtype its weights have.

    Differences of predictions, and derivatives from differences, need float32. The weights stay in
    half precision, and those of each layer are float32 while it runs. So the results are those of
    `model.float()`, in half the memory. Weights in float32 are not touched.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            half = any(p is not None and p.dtype in HALVES for p in module._parameters.values())
            if half or (module is model and any(p.dtype in HALVES for p in model.parameters())):
                widened = _WidenedModule(module)
                pre = module.register_forward_pre_hook(
                    widened.before, with_kwargs=True, prepend=True
                )
                post = module.register_forward_hook(widened.after, always_call=True)
                hooks.callback(pre.remove)
                hooks.callback(post.remove)
        yield
