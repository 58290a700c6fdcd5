"""Text encoders that run once and give their memory back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ProLoRAError

TEXT_ENCODERS = "text_encoder"
"""What the names of a pipeline's text encoders begin with."""
_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)


def empty_weights(modules: Iterable[nn.Module]) -> None:
    """Frees the memory of modules that do not run again.

    Their tensors keep dtype and device, which pipelines ask for, and hold no number.
    """
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.new_empty(0)


class PromptMemory:
    """A memory of the answers of a pipeline's text encoders.

    It replaces the pipeline's `encode_prompt`, whose answers depend on its arguments alone.

    Attributes:
        pipe: the diffusers pipeline.
        answers: of the calls so far.
        state: what runs beside the encoders' weights, as a text; "" for nothing.
        is_freed: whether the encoders are gone.
    """

    def __init__(self, pipe: Any) -> None:
        """Replaces the pipeline's method, if it has one."""
        self.pipe, self.state, self.is_freed = pipe, "", False
        self.answers: dict[str, Any] = {}
        self._encode = getattr(pipe, "encode_prompt", None)
        self._remembers_all = self._encode is not None
        if self._encode is not None:
            pipe.encode_prompt = self

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders by the pipeline's names of them."""
        parts = self.pipe.components.items()
        return {
            name: part
            for name, part in parts
            if name.startswith(TEXT_ENCODERS) and isinstance(part, nn.Module)
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the answer of `encode_prompt`; a known one where it was asked the same before.

        Raises:
            ProLoRAError: a prompt is new, and the encoders are gone.
        """
        assert self._encode is not None
        key = _write_key((self.state, args, sorted(kwargs.items())))
        asked = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.device))
        if key is not None and key in self.answers:
            return _move_tensors(self.answers[key], next(asked, None))
        if self.is_freed:
            raise ProLoRAError(
                f"{type(self.pipe).__name__} asks its text encoders about a prompt again, in "
                "another way than before its first image, so it cannot be fitted"
            )
        answer = self._encode(*args, **kwargs)
        if key is None:
            self._remembers_all = False
        else:
            self.answers[key] = answer
        return answer

    @contextmanager
    def under(self, state: str) -> Iterator[None]:
        """Remembers answers apart while something runs beside the encoders' weights."""
        before, self.state = self.state, f"{self.state} {state}"
        try:
            yield
        finally:
            self.state = before

    def release(self) -> None:
        """Frees the text encoders, unless one of their answers could not be remembered."""
        self.is_freed = self._remembers_all
        if self.is_freed:
            empty_weights(self.encoders.values())


def _move_tensors(value: Any, device: torch.device | None) -> Any:
    """Moves the tensors of an answer to a device; None leaves them."""
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_move_tensors(item, device) for item in value)
    return value


def _write_key(value: Any) -> str | None:
    """Writes arguments as a text; None where one is no plain value."""
    if isinstance(value, list | tuple):
        parts = [_write_key(item) for item in value]
        return None if None in parts else f"[{', '.join(map(str, parts))}]"
    if isinstance(value, torch.device):
        return "device"  # prompts may be encoded in the machine's memory, and asked for on a card
    return repr(value) if isinstance(value, _PLAIN) else None
