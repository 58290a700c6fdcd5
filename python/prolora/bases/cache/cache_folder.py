"""The size of a cache folder: what was unused for longest goes first.

bases/, tables/ and files/ hold what is named by digests. Only files of exactly such names are
counted or deleted, and no link is followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...files.sizes import parse_size

LIMIT_VARIABLE = "PROLORA_CACHE_SIZE"
DEFAULT_LIMIT = "32GiB"  # the bases of some five models of SDXL's size

_FILE = re.compile(r"[0-9a-f]{32}\.(?:safetensors|json|txt)")


def measure_cache(folder: Path) -> int:
    """Counts the bytes of all files of a cache folder."""
    return sum(size for _, size, _ in _list_files(folder))


def trim_cache(folder: Path) -> None:
    """Deletes the files unused for longest, down to the limit.

    Raises:
        InvalidOption: PROLORA_CACHE_SIZE is no size.
    """
    limit = parse_size(os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT)
    files = sorted(_list_files(folder))
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= limit:
            return
        with suppress(OSError):  # another process uses or has deleted it
            path.unlink()
            total -= size


def _list_files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yields when each file of a cache was last used, its bytes, and its path."""
    for kind in ("bases", "tables", "files"):
        if (folder / kind).is_symlink():
            continue
        with suppress(OSError), os.scandir(folder / kind) as entries:
            for entry in entries:
                if _FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    yield status.st_mtime, status.st_size, Path(entry)
