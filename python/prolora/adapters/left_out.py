"""What stays behind of an adapter's file: sizes and neighbours of tensors that are not read."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from .algorithms import forms
from .keys import tensor_keys
from .lora import Lora

Size = tuple[int, int, int]
"""(out, in, rank) of an update."""


def measure_update(keys: Mapping[str, str], source: Lora) -> Size | None:
    """Returns (out, in, rank) of an update from its shapes, None if unclear.

    `keys` is role -> key.
    """
    shapes = {role: source.headers[key].shape for role, key in keys.items()}
    if forms.find_missing_role(shapes.keys()) is None and (form := forms.derive_form(shapes)):
        return form.out, form.inputs, max(1, form.rank)
    return None


def measure_unread(keys: Collection[str], source: Lora) -> Size:
    """Returns (out, in, rank) of an update, else of the largest tensor."""
    roles = {parsed[1]: key for key in keys if (parsed := tensor_keys.split_role(key))}
    shapes = [source.headers[key].shape for key in keys]
    largest = max(shapes, key=math.prod) or (1,)
    return measure_update(roles, source) or (largest[0], math.prod(largest[1:]), 1)


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
