"""Forward hooks within a `with` block, and a module's first call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class FirstCallReached(Exception):
    """Ends a forward pass, or a pipeline, at a module's first call."""


@contextlib.contextmanager
def keep_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes registered hooks at the end of the block, also where it raises."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


def capture_first_call(
    module: nn.Module, run: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Captures the arguments of a module's first call; `run` ends there.

    The module's forward is not run. `run` must let `FirstCallReached` pass. Returns positional and
    keyword arguments; None where `run` ended without a call.
    """
    captured: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append((args, kwargs))
        raise FirstCallReached

    with keep_hooks([module.register_forward_pre_hook(stop, with_kwargs=True)]):
        try:
            run()
        except FirstCallReached:
            pass
    return captured[0] if captured else None
