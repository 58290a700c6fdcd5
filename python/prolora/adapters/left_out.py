"""What is left out of an adapter by name: tensors of no LoRA, and updates of no known kind."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from .algorithms import forms
from .keys import tensor_keys
from .lora import Lora

UNKNOWN_UPDATE = "an update of a module that prolora does not know"
"""Why it stays behind; it may be all that is left of one whose name was damaged."""

Size = tuple[int, int, int]
"""(out, in, rank) of an update."""


def leave_out_foreign(
    unknown: Iterable[str], left_out: dict[str, str], source: Lora
) -> dict[str, Size]:
    """Records the unknown tensors of a file; returns (out, in, rank) of updates."""
    updates: dict[str, dict[str, str]] = {}
    for key in unknown:
        path_and_role = tensor_keys.split_role(key)
        if path_and_role is None:
            left_out[key] = (
                "a tensor that belongs to no LoRA, or to a module that prolora does not know"
            )
        else:
            updates.setdefault(path_and_role[0], {})[path_and_role[1]] = key
    left_out |= dict.fromkeys(updates, UNKNOWN_UPDATE)
    sizes = {path: measure_update(keys, source) for path, keys in updates.items()}
    return {path: size for path, size in sizes.items() if size}


def find_unknown_updates(left_out: Mapping[str, str]) -> list[str]:
    """Returns the left-out tensors that may be the rest of an update."""
    return [name for name, why in left_out.items() if why == UNKNOWN_UPDATE]


def measure_update(keys: Mapping[str, str], source: Lora) -> Size | None:
    """Returns (out, in, rank) of an update from its shapes, None if unclear.

    `keys` is role -> key.
    """
    shapes = {role: source.headers[key].shape for role, key in keys.items()}
    if forms.find_missing_role(shapes.keys()) is None and (form := forms.derive_form(shapes)):
        return form.out, form.inputs, max(1, form.rank)
    if all(len(shapes.get(role, ())) > 1 for role in ("up", "down")):  # also over time
        return shapes["up"][0], math.prod(shapes["down"][1:]), shapes["down"][0]
    return None


def find_volumes(slots: Mapping[str, Mapping[str, str]], source: Lora) -> list[str]:
    """Returns the modules with an update of a convolution over time.

    `slots` is module -> role -> key.
    """
    return [
        name
        for name, keys in slots.items()
        if any(len(source.headers[key].shape) > 4 for key in keys.values())
    ]


def find_neighbours(
    keys: Collection[str], updates: Mapping[str, Iterable[str]]
) -> dict[str, tuple[str, str]]:
    """Returns key -> (module, suffix) of tensors beside an update, not part of it.

    `keys` are the tensors that are not read; `updates` is module -> the keys that are read.
    """
    if not keys:
        return {}
    paths = {tensor_keys.find_path(key): name for name, own in updates.items() for key in own}
    found = {}
    for key in keys:
        end = len(key)
        # kohya's names join by underscores: `…_to_q_gain` stands beside `…_to_q`.
        while key not in found and (end := max(key.rfind(mark, 0, end) for mark in "._")) > 0:
            # `to_q_lora.down` is a factor of `to_q`.
            name = paths.get(key[:end]) or paths.get(key[:end].removesuffix("_lora"))
            if name is not None:
                found[key] = name, key[end + 1 :]
    return found
