"""The families that are known, one a file; see `..family`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..family import Family


@cache
def known_families() -> dict[str, Family]:
    """Id -> family, in the order of their files' names."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    families = (importlib.import_module(f"{__name__}.{file}").FAMILY for file in files)
    return {family.id: family for family in families}
