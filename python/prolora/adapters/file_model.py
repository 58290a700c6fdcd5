"""What model a LoRA's file is for, by its keys."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from ..architectures.families import known_families
from ..architectures.family import Family
from ..architectures.identify import UNKNOWN, Model, NamedMatrix, identify
from ..architectures.ldm import ADM, is_adm
from ..architectures.modules import find_block, is_in_adm
from .algorithms import forms
from .keys import tensor_keys
from .keys.module_names import find_transformer_name, most_common_spelling, parse_module_path

Shapes = Mapping[str, tuple[int, ...]]
"""Key -> shape of a file's tensors."""
Size = tuple[int, int, int]
"""(out, in, rank) of an update."""

_ADM_ATTENTION = re.compile(r"(?:(?:in|out)put_blocks[._]\d+[._]\d+|middle_block[._]\d+)[._]qkv$")


class BaseNames(NamedTuple):
    """What is known of the base model that an adapter belongs to."""

    model: Model = UNKNOWN
    modules: Collection[str] = ()  # its canonical module names; empty if they are not known


def identify_file(tensors: Shapes, header: Mapping[str, str]) -> Model:
    """Returns what model a file (key -> shape) is for."""
    updates: dict[str, dict[str, str]] = {}
    for key in tensors:
        path, role = tensor_keys.split_key(key)
        if path:
            updates.setdefault(path, {})[role] = key
    if _is_adm(updates, ()):
        return UNKNOWN
    shapes, matrices = {}, []
    for path, roles in updates.items():
        size = _measure_sides({role: tensors[key] for role, key in roles.items()})
        if name := find_transformer_name(path):
            matrices.append(NamedMatrix(*name, size))
        elif module := parse_module_path(path):
            shapes[module.name] = size
    model = identify(shapes, header, matrices)
    family = _find_table(model.names)
    modules = (parse_module_path(path, family) for path in updates)
    return model.spelled(most_common_spelling(module for module in modules if module))


def choose_names(model: Model, tensors: Shapes, base: BaseNames | None) -> Family | None:
    """Returns the family whose names a file has, None without one."""
    if _is_adm((tensor_keys.split_key(key)[0] for key in tensors), base.modules if base else ()):
        return ADM
    given = base.model.family if base else None
    return _find_table((given,) if given in model.able else model.names)


def _find_table(ids: tuple[str | None, ...]) -> Family | None:
    """Returns the first of some families; a UNet's names follow from arithmetic instead."""
    family = known_families().get(ids[0] or "") if ids else None
    return None if family is None or family.unet else family


def _is_adm(paths: Iterable[str], modules: Collection[str]) -> bool:
    """Recognises the LoRA of an ADM network, by its base's modules if they are known."""
    if modules:
        return any(is_in_adm(name) and find_block(name) for name in modules)
    names = set(paths)
    return any(map(_ADM_ATTENTION.search, names)) and is_adm(names)


def _measure_sides(roles: Shapes) -> tuple[int, int]:
    """Returns out × in of an update (role -> shape); 0 for what one tensor does not tell."""
    if size := measure_update(roles):
        return size[:2]
    up, down = (roles.get(role, ()) for role in ("up", "down"))
    return up[0] if len(up) > 1 else 0, math.prod(down[1:]) if len(down) > 1 else 0


def measure_update(roles: Shapes) -> Size | None:
    """Returns (out, in, rank) of an update (role -> shape), None if unclear."""
    if forms.find_missing_role(roles.keys()) is None and (form := forms.derive_form(dict(roles))):
        return form.out, form.inputs, max(1, form.rank)
    return None
