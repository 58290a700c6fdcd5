"""All known families; see `..family`."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable
from functools import cache
from pkgutil import iter_modules

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


def list_loaded(families: Iterable[str], sizes: Collection[str] = ()) -> tuple[str, ...]:
    """Lists the ids of families, or of their groups of sizes that programs tell apart.

    `sizes` are the published sizes that something may be for, if they are known.
    """
    groups = [group for id_ in families for group in known_families()[id_].as_loaded]
    likely = [group for group in groups if not {*sizes}.isdisjoint(group.layouts)]
    return tuple(group.id for group in likely or groups)


@cache
def loaded_families() -> dict[str, Family]:
    """Returns id -> family, or group of sizes that programs tell apart."""
    return known_families() | {
        group.id: group for family in known_families().values() for group in family.as_loaded
    }


@cache
def known_families() -> dict[str, Family]:
    """Returns id -> family, sorted by id."""
    files = [importlib.import_module(f"{__name__}.{one.name}") for one in iter_modules(__path__)]
    families = [one for file in files for one in getattr(file, "FAMILIES", ()) or (file.FAMILY,)]
    return {family.id: family for family in sorted(families, key=lambda family: family.id)}
