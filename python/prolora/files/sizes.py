"""Numbers of bytes as people write them, read and written."""

from __future__ import annotations

import re

from ..errors import InvalidOption

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_size(text: str) -> int:
    """Reads a number of bytes: "2GiB", "500MB", "1.5g", "1000000".

    Raises:
        ValueError: another text, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*(|[kmgt]i?)b?\s*", text.lower(), re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not size:
        raise ValueError(f"a size is a number with a unit, as 2GiB or 500MB, not {text!r}")
    return size


def parse_limit(value: float | str | None, name: str = "max_memory") -> int | None:
    """Reads a bound on memory in bytes: a number, a text, or None.

    Texts are as for `parse_size`; `name` is the option's in messages.

    Raises:
        InvalidOption: anything else; NaN and numbers below 1 too.
    """
    if value is None:
        return None
    try:
        limit = parse_size(value) if isinstance(value, str) else int(value)
    except (ValueError, OverflowError, TypeError):
        limit = 0
    if limit < 1 or isinstance(value, bool):
        raise InvalidOption(f'`{name}` must be bytes, or a size such as "2GiB", not {value!r}')
    return limit


def format_size(size: float) -> str:
    """Writes bytes for people: "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
