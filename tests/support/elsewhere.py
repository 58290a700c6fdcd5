"""Tensors that behave as if they were on another device, on machines that have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ELSEWHERE = torch.device("privateuseone:0")
_LEAVES = {"cpu", "item", "tolist", "numpy", "__repr__", "__format__", "__bool__", "__float__"}
_MIXES = {"copy_"}


class Elsewhere(Tensor):
    """A tensor of another device: no op takes it together with one of the CPU."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an op, and refuses operands of two devices as torch does."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "__get__" and function.__self__ is Tensor.device:
            return ELSEWHERE
        operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        plain = [x for x in operands if not isinstance(x, cls) and x.dim()]
        if plain and name not in _MIXES:
            raise RuntimeError(f"Expected all tensors to be on the same device ({name})")
        leaves = name in _LEAVES or (name == "to" and _names_cpu(args[1:], kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = pytree.tree_map_only(cls, _unwrap, (args, kwargs))
            if not leaves:
                args, kwargs = pytree.tree_map_only(torch.device, _place, (args, kwargs))
            result = function(*args, **kwargs)
        # In place, or as asked: on the device of the first operand.
        if leaves or (operands and not isinstance(operands[0], cls)):
            return result
        return pytree.tree_map_only(Tensor, move, result)


def _unwrap(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


def _place(device: torch.device) -> torch.device:
    return torch.device("cpu") if device == ELSEWHERE else device


def _names_cpu(words: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `to` names the CPU, as a device or by a tensor that is there."""
    for word in (*words, *kwargs.values()):
        if isinstance(word, str | torch.device):
            return torch.device(word).type == "cpu"
        if isinstance(word, Tensor):
            return not isinstance(word, Elsewhere)
    return False


def move(x: Tensor) -> Tensor:
    """Puts a tensor there."""
    return x if isinstance(x, Elsewhere) else x.detach().as_subclass(Elsewhere)
