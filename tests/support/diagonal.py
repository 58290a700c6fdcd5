"""Some of many cases for every change; the rest is slow."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from prolora.architectures.families import known_families


def pair_up(rows: Collection[Any], columns: Collection[Any]) -> list[Any]:
    """All pairs, slow but for a diagonal on which each value is there at least once."""
    return [
        pytest.param(
            row,
            column,
            marks=() if i % len(columns) == j or j % len(rows) == i else pytest.mark.slow,
        )
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def keep_some(values: Collection[Any], *kept: Any) -> list[Any]:
    """The values, slow but for those that are kept."""
    return [pytest.param(v, marks=() if v in kept else pytest.mark.slow) for v in values]


def mark_size(layout: str) -> Any:
    """Marks a case as slow unless the layout is the first size of a family."""
    firsts = {family.layouts[0] for family in known_families().values()}
    return () if layout in firsts else pytest.mark.slow


def list_sizes(layouts: Collection[str]) -> list[Any]:
    """The layouts, slow but for the first size of every family."""
    return [pytest.param(layout, marks=mark_size(layout)) for layout in layouts]
