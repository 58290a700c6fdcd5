"""Models stored in half precision, computed in float32, one layer's weights at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


def _widen_halves(value: Any) -> Any:
    """Half-precision tensors as float32, in any nesting."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALVES else value
    if isinstance(value, dict):
        return {key: _widen_halves(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_widen_halves(item) for item in value)
    return value


class _WidenedModule:
    """The hooks of one module: its own weights in float32 while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kept: dict[str, Any] = {}

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # As functional_call does: another tensor under the parameter's name. What autograd saves is
        # that tensor, so that nothing changes under a graph when the stored one comes back.
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype in HALVES:
                self.kept[name] = parameter
                module._parameters[name] = parameter.detach().float()  # type: ignore[assignment]
        return _widen_halves(args), _widen_halves(kwargs)

    def after(self, module: nn.Module, *_: Any) -> None:
        for name, parameter in self.kept.items():
            module._parameters[name] = parameter
        self.kept = {}


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """The model takes and gives float32, and computes in it, whatever its weights are stored in.

    Differences of predictions and derivatives by differences need float32. Weights stay stored in
    half precision and each layer's are widened while it runs, so the results are those of
    `model.float()`, in half its memory. Weights that are float32 already are left alone.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            own = any(p is not None and p.dtype in HALVES for p in module._parameters.values())
            if own or (module is model and any(p.dtype in HALVES for p in model.parameters())):
                widened = _WidenedModule(module)
                pre = module.register_forward_pre_hook(
                    widened.before, with_kwargs=True, prepend=True
                )
                post = module.register_forward_hook(widened.after, always_call=True)
                hooks.callback(pre.remove)
                hooks.callback(post.remove)
        yield
