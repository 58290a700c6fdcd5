"""What is left out of an adapter by name: tensors of no LoRA, and updates of no known kind."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .keys import tensor_keys
from .unread import UnreadAdapter


def leave_out_foreign(
    unknown: list[str], left_out: dict[str, str], source: UnreadAdapter
) -> dict[str, tuple[int, int, int]]:
    """Names what is not understood among much that is; (out, in, rank) of what is an update."""
    updates: dict[str, dict[str, tuple[int, ...]]] = {}
    for key in unknown:
        path_and_role = tensor_keys.split_role(key)
        if path_and_role is None:
            left_out[key] = (
                "a tensor that belongs to no LoRA, or to a module that prolora does not know"
            )
            continue
        left_out[path_and_role[0]] = "an update of a module that prolora does not know"
        updates.setdefault(path_and_role[0], {})[path_and_role[1]] = source.headers[key].shape
    return {
        path: (shapes["up"][0], math.prod(shapes["down"][1:]), shapes["down"][0])
        for path, shapes in updates.items()
        if all(len(shapes.get(role, ())) > 1 for role in ("up", "down"))
    }


def find_volumes(slots: Mapping[str, Mapping[str, str]], source: UnreadAdapter) -> list[str]:
    """The modules with an update of a convolution over time.

    Args:
        slots: module -> role -> key.
        source: the adapter.
    """
    return [
        name
        for name, keys in slots.items()
        if any(len(source.headers[key].shape) > 4 for key in keys.values())
    ]


def leave_out_volume(
    name: str, keys: Mapping[str, str], left_out: dict[str, str], source: UnreadAdapter
) -> dict[str, tuple[int, int, int]]:
    """Names the update of a convolution over time; its (out, in, rank) if it has factors."""
    left_out[name] = "an update of a convolution over time: not moved"
    shapes = {role: source.headers[key].shape for role, key in keys.items()}
    if not {"up", "down"} <= shapes.keys():
        return {}
    return {name: (shapes["up"][0], math.prod(shapes["down"][1:]), shapes["down"][0])}
