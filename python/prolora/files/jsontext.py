"""JSON: objects read or refused, and numbers that JSON cannot hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import UnsupportedFormat, input_error
from .untrusted import open_regular

LFS_START = b"version https://git-lfs"
LFS_POINTER = (
    "a pointer of Git LFS, not the file itself; fetch it with git lfs pull, or download it again"
)
"""What stands for a large file in a repository cloned without Git LFS."""

# Bytes; parsed, hostile text takes 25 times as many.
SIZE_LIMIT = 32 << 20


def replace_nonfinite(value: Any) -> Any:
    """Replaces NaN and infinities by None, all the way down, for JSON."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def parse_json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object.

    Bytes are UTF-8, perhaps with a byte order mark; messages call it `where`.

    Raises:
        UnsupportedFormat: it is damaged, or another kind of value.
    """
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise UnsupportedFormat(f"{where}: is damaged: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedFormat(f"{where}: holds no JSON object")
    return value


def read_json_object(path: Path, limit: int = SIZE_LIMIT) -> dict[str, Any]:
    """Reads a UTF-8 file of at most `limit` bytes that holds one JSON object.

    Raises:
        UnsupportedFormat: it is missing, unreadable, too large, damaged or holds no object.
    """
    with open_regular(path, limit) as file:
        try:
            text = file.read()
        except OSError as error:
            raise input_error(path, error) from error
    if text.startswith(LFS_START):
        raise UnsupportedFormat(f"{path}: {LFS_POINTER}")
    return parse_json_object(text, str(path))
