"""All known families, one a file; see `..family`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache

from ..family import Family
from ..layouts import known_layouts, load_layout


def find_title(id_: str) -> str:
    """Returns the title of a family or of a published size, else the id itself."""
    family = known_families().get(id_)
    if family is not None:
        return family.title
    return load_layout(id_).title if id_ in known_layouts() else id_


def join_titles(titles: Iterable[str]) -> str:
    """Joins the models that something may be for, in words; "" for none."""
    *others, last = list(titles) or [""]
    return f"{', '.join(others)} or {last}" if others else last


@cache
def known_families() -> dict[str, Family]:
    """Returns id -> family, sorted by file name."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    families = (importlib.import_module(f"{__name__}.{file}").FAMILY for file in files)
    return {family.id: family for family in families}
