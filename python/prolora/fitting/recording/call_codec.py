"""Recorded calls as tensors and a text, for files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ...errors import ProLoRAError
from .trajectories import Call

_PLAIN = (bool, int, float, str, type(None))


def encode_calls(calls: Iterable[Call]) -> tuple[list[Tensor], str]:
    """Encodes calls as tensors, each object once, and a text of their positions."""
    tensors: list[Tensor] = []
    positions: dict[int, int] = {}

    def encode(value: Any) -> dict[str, Any]:
        if isinstance(value, Tensor):
            if id(value) not in positions:
                positions[id(value)] = len(tensors)
                tensors.append(value)
            return {"tensor": positions[id(value)]}
        if isinstance(value, _PLAIN):
            return {"plain": value}
        if isinstance(value, dict):
            return {"dict": {str(key): encode(item) for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [encode(item) for item in value]}
        raise ProLoRAError(
            f"a model was called with a {type(value).__name__}, which cannot be kept in a file; "
            "probe without resume and without max_memory"
        )

    rows = [
        {
            "args": encode(tuple(call.args)),
            "kwargs": encode(call.kwargs),
            "origin": call.origin,
            "trajectories": call.trajectories,
            "clean": encode(call.clean),
        }
        for call in calls
    ]
    return tensors, json.dumps(rows)


def decode_calls(tensors: Sequence[Tensor], text: str) -> list[Call]:
    """Decodes calls from the tensors and the text of `encode_calls`."""

    def decode(encoded: dict[str, Any]) -> Any:
        ((kind, value),) = encoded.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "plain":
            return value
        if kind == "dict":
            return {key: decode(item) for key, item in value.items()}
        items = [decode(item) for item in value]
        return tuple(items) if kind == "tuple" else items

    return [
        Call(
            decode(row["args"]),
            decode(row["kwargs"]),
            row["origin"],
            tuple(row.get("trajectories", ())),
            decode(row["clean"]) if "clean" in row else None,
        )
        for row in json.loads(text)
    ]
