"""Files of a cache folder, named by digests; the oldest go first.

v3/<2 hex digits>/<64>.safetensors are bases; v3/index-<32>.json and similar names are tables. Only
files of exactly such names are counted or deleted, and no link is followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...files.sizes import parse_size

# Part of every name of a basis: raise it when an algorithm's results change, or what a file holds.
VERSION = 3
LIMIT_VARIABLE = "PROLORA_CACHE_SIZE"
DEFAULT_LIMIT = "32GiB"  # the bases of some ten models of SDXL's size

_FOLDER = re.compile(r"v[1-9][0-9]{0,8}|[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{64}\.safetensors|(?:index|pairs|files)-[0-9a-f]{32}\.json")


def versioned_folder(folder: Path) -> Path:
    """Returns where files of this version lie in a cache folder."""
    return folder / f"v{VERSION}"


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
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False) and _FOLDER.fullmatch(entry.name):
                    yield from _list_files(Path(entry))
                elif entry.is_file(follow_symlinks=False) and _FILE.fullmatch(entry.name):
                    yield status.st_mtime, status.st_size, Path(entry)
