"""JSON: what it can hold, and text that is none."""

from __future__ import annotations

import math
from typing import Any


def replace_nonfinite(value: Any) -> Any:
    """NaN and infinities as None, all the way down: JSON has no words for them."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
