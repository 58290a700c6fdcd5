"""Recorded calls as tensors and a text, so that they can lie in files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..errors import ProLoRAError
from .trajectories import Call

_PLAIN = (bool, int, float, str, type(None))


def encode_calls(calls: Iterable[Call]) -> tuple[list[Tensor], str]:
    """The tensors of some calls, each object once, and a text that says where they belong.

    Raises:
        ProLoRAError: an argument that is neither a tensor nor a plain value.
    """
    tensors: list[Tensor] = []
    places: dict[int, int] = {}

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in places:
                places[id(value)] = len(tensors)
                tensors.append(value)
            return {"tensor": places[id(value)]}
        if isinstance(value, _PLAIN):
            return {"plain": value}
        if isinstance(value, dict):
            return {"dict": {str(key): told(item) for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [told(item) for item in value]}
        raise ProLoRAError(
            f"a model was called with a {type(value).__name__}, which cannot be kept in a file; "
            "probe without resume and without max_memory"
        )

    rows = [
        {"args": told(tuple(call.args)), "kwargs": told(call.kwargs), "origin": call.origin}
        for call in calls
    ]
    return tensors, json.dumps(rows)


def decode_calls(tensors: Sequence[Tensor], text: str) -> list[Call]:
    """What `encode_calls` took apart."""

    def made(told: dict[str, Any]) -> Any:
        ((kind, value),) = told.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "plain":
            return value
        if kind == "dict":
            return {key: made(item) for key, item in value.items()}
        several = [made(item) for item in value]
        return tuple(several) if kind == "tuple" else several

    return [Call(made(row["args"]), made(row["kwargs"]), row["origin"]) for row in json.loads(text)]
