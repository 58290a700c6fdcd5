"""Of a product of many cases, each side once for every change; the rest is slow."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pytest


def pair_up(rows: Collection[Any], columns: Collection[Any]) -> Iterator[Any]:
    """All pairs, slow but for a diagonal on which each value is there at least once."""
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            early = i % len(columns) == j or j % len(rows) == i
            yield pytest.param(row, column, marks=() if early else pytest.mark.slow)
