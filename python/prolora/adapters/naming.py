"""What the names of a file's modules say before they are understood: shapes, spelling, the base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

from ..architectures.family import SPELLINGS, AuthorsWeight, Family, Spelling
from ..architectures.ldm import ADM, is_adm
from ..architectures.modules import find_block, is_in_adm
from ..architectures.recognition import NamedMatrix
from ..errors import ShapeMismatch
from .family_guess import choose_reading
from .keys import tensor_keys
from .keys.module_names import ModulePath
from .lora import Lora

_ADM_ATTENTION = re.compile(r"(?:(?:in|out)put_blocks[._]\d+[._]\d+|middle_block[._]\d+)[._]qkv$")


class BaseNames(NamedTuple):
    """What is known of the base model that an adapter belongs to."""

    family: str | None = None  # None if it is not known
    modules: Collection[str] = ()  # its canonical module names; empty if they are not known


def choose_names(
    source: Lora, matrices: Iterable[NamedMatrix], base: BaseNames | None
) -> Family | None:
    """Returns the family whose names the modules are read by, or None.

    LDM's numbers mean modules of an ADM network where the base is one, and where no base is known
    and attention has its name there.
    """
    if base and base.modules:
        numbered = any(is_in_adm(name) and find_block(name) for name in base.modules)
    else:
        paths = {tensor_keys.split_key(key)[0] for key in source.headers}
        numbered = any(map(_ADM_ATTENTION.search, paths)) and is_adm(paths)
    if numbered:
        return ADM
    return choose_reading(matrices, source.metadata, base.family if base else None)


def most_common_spelling(modules: Iterable[ModulePath]) -> Spelling | None:
    """Returns how most modules of a transformer are spelled, None without any.

    A module with one name everywhere does not tell whose names a file has. Where all are of that
    kind, the file has the names of its prefix's format.
    """
    spelled = [module for module in modules if module.spelling]
    counts = Counter(module.spelling for module in spelled if not module.alike)
    if counts:
        return max(counts, key=lambda one: counts[one])
    first = next((module.spelling for module in spelled), None)
    return next((one for one in SPELLINGS.values() if first and one[::2] == first[::2]), first)


def split_rows(whole: AuthorsWeight, height: int, where: str) -> list[int]:
    """Returns the height of every part of a weight of `height` rows.

    Raises:
        ShapeMismatch: the rows do not divide evenly.
    """
    unit, rest = divmod(height, sum(whole.shares))
    if rest or not unit or (whole.swap == "always" and height % 2):
        raise ShapeMismatch(
            f"{where}: {height} rows are not those of {' + '.join(whole.parts)}, "
            f"{':'.join(map(str, whole.shares))}"
        )
    return [share * unit for share in whole.shares]
