"""Of a product of many cases, each side once for every change; the rest is slow."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest


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
