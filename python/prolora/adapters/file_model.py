"""What model a LoRA's file is for, by its keys."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from ..architectures.families import known_families
from ..architectures.family import Family
from ..architectures.identify import UNKNOWN, Model, NamedMatrix, identify
from ..architectures.modules import find_block, is_in_adm
from ..architectures.shared_names import is_adm
from .algorithms import forms
from .keys.codec import ADM, Codec, CutPath, Module, most_common_spelling, read_without_family
from .keys.tensor_keys import StoredTensor

Size = tuple[int, int, int]
"""(out, in, rank) of an update."""

_ADM_ATTENTION = re.compile(r"(?:(?:in|out)put_blocks[._]\d+[._]\d+|middle_block[._]\d+)[._]qkv$")


class BaseNames(NamedTuple):
    """What is known of the base model that an adapter belongs to."""

    model: Model = UNKNOWN
    modules: Collection[str] = ()  # its canonical module names; empty if they are not known


def identify_file(tensors: Iterable[StoredTensor], header: Mapping[str, str]) -> Model:
    """Returns what model a file is for."""
    updates: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in tensors:
        if tensor.path:
            updates.setdefault(tensor.path, {})[tensor.role] = tensor.shape
    if _is_adm(updates, ()):
        return UNKNOWN
    shapes, matrices = {}, {}
    for path, roles in updates.items():
        size = _measure_sides(tuple(roles.items()))
        match read_without_family(path):
            case Module(name=name):
                shapes[name] = size
            case CutPath(rest=rest, dotted=dotted):
                matrices[path] = NamedMatrix(rest, dotted, size)
    model = identify(shapes, header, matrices.values())
    codec = Codec.of(model, _find_table(model.names))
    modules = map(codec.read, matrices)
    return model.spelled(most_common_spelling(module for module in modules if module))


def choose_codec(model: Model, tensors: Iterable[StoredTensor], base: BaseNames) -> Codec:
    """Returns what reads the names of a file: its base decides, if it is known."""
    if _is_adm((tensor.path for tensor in tensors), base.modules):
        return Codec(ADM)
    given = base.model.family
    family = _find_table((given,) if given in model.able else model.names)
    return Codec.of(model.of_base(base.model), family, base.modules)


def _find_table(ids: tuple[str | None, ...]) -> Family | None:
    """Returns the first of some families; UNets of all sizes share their names."""
    family = known_families().get(ids[0] or "") if ids else None
    return None if family is None or family.unet else family


def _is_adm(paths: Iterable[str], modules: Collection[str]) -> bool:
    """Recognises the LoRA of an ADM network, by its base's modules if they are known."""
    if modules:
        return any(is_in_adm(name) and find_block(name) for name in modules)
    names = set(paths)
    some = (name for name in names if name.endswith("qkv"))
    return any(map(_ADM_ATTENTION.search, some)) and is_adm(names)


@lru_cache(1 << 12)  # a file's updates have few shapes
def _measure_sides(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[int, int]:
    """Returns out × in of an update (role, shape); 0 for what one tensor does not tell."""
    roles = dict(shapes)
    if size := measure_update(roles):
        return size[:2]
    up, down = (roles.get(role, ()) for role in ("up", "down"))
    return up[0] if len(up) > 1 else 0, math.prod(down[1:]) if len(down) > 1 else 0


def measure_update(roles: Mapping[str, tuple[int, ...]]) -> Size | None:
    """Returns (out, in, rank) of an update (role -> shape), None if unclear."""
    if forms.find_missing_role(roles.keys()) is None and (form := forms.derive_form(roles)):
        return form.out, form.inputs, max(1, form.rank)
    return None
