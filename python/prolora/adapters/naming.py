"""What the names of a file's modules say before they are understood: shapes, spelling, the base."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

from ..architectures.family import Family, Spelling
from ..architectures.ldm import ADM, is_adm
from ..architectures.modules import find_block, is_in_adm
from ..architectures.recognition import NamedMatrix
from .family import choose_reading
from .keys import module_names, tensor_keys
from .keys.module_names import ModulePath
from .unread import UnreadAdapter

_ADM_ATTENTION = re.compile(r"(?:(?:in|out)put_blocks[._]\d+[._]\d+|middle_block[._]\d+)[._]qkv$")


class BaseNames(NamedTuple):
    """What is known of the base model that an adapter belongs to.

    Attributes:
        family: id of its family, None if it is not known.
        modules: its canonical module names; empty if they are not known.
    """

    family: str | None = None
    modules: Collection[str] = ()


def list_matrices(source: UnreadAdapter) -> list[NamedMatrix]:
    """What can be modules of a transformer, as the file names them, with the shapes of updates."""
    sizes: dict[tuple[str, bool], list[int]] = {}
    for key, header in source.headers.items():
        path = tensor_keys.find_path(key)
        name = path and module_names.find_transformer_name(path)
        if not name:
            continue
        size = sizes.setdefault(name, [0, 0])
        _, role = tensor_keys.split_role(key) or ("", "")
        shape = header.shape
        if role == "up" and len(shape) > 1:
            size[0] = shape[0]
        elif role == "down" and len(shape) > 1:
            size[1] = math.prod(shape[1:])
        elif role == "diff" and len(shape) > 1:
            size[:] = shape[0], math.prod(shape[1:])
    return [NamedMatrix(*name, (size[0], size[1])) for name, size in sizes.items()]


def choose_names(
    source: UnreadAdapter, matrices: Iterable[NamedMatrix], base: BaseNames | None
) -> Family | None:
    """By whose names the modules of a UNet or transformer are read; None where nobody knows them.

    LDM's numbers mean modules of an ADM network where the base is one, and where no base is known
    and attention has the name it has there.
    """
    if base and base.modules:
        numbered = any(is_in_adm(name) and find_block(name) for name in base.modules)
    else:
        paths = {tensor_keys.find_path(key) or "" for key in source.headers}
        numbered = any(map(_ADM_ATTENTION.search, paths)) and is_adm(paths)
    if numbered:
        return ADM
    return choose_reading(matrices, source.metadata, base.family if base else None)


def most_common_spelling(modules: Iterable[ModulePath]) -> Spelling | None:
    """How most modules of a transformer are spelled; None where there are none."""
    counts = Counter(module.spelling for module in modules if module.spelling)
    return max(counts, key=lambda one: counts[one]) if counts else None
