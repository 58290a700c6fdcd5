"""What the names of a file's modules say before they are understood: shapes, spelling, the base."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

from ..architectures.family import Spelling
from ..architectures.recognition import NamedMatrix
from .keys import module_names, tensor_keys
from .keys.module_names import ModulePath
from .unread import UnreadAdapter


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


def most_common_spelling(modules: Iterable[ModulePath]) -> Spelling | None:
    """How most modules of a transformer are spelled; None where there are none."""
    counts = Counter(module.spelling for module in modules if module.spelling)
    return max(counts, key=lambda one: counts[one]) if counts else None
