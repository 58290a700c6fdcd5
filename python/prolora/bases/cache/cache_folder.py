"""Which files belong to a cache folder: exact names, a marker made with it, and no link followed.

A cache folder holds one folder for each version of the algorithms:

    v3/CACHEDIR.TAG                         the marker; backup programs that know it skip the folder
    v3/index-<32 hex digits>.json           tables, see `tables.JsonTable`
    v3/<2 hex digits>/<64>.safetensors      bases, in the shelf that their names begin with
    v3/.prolora-<16>.tmp, in a shelf too    files of writers at work, or killed

A folder that was here before prolora has no marker, and neither have caches made before there was
one. There a file counts only if its content says that prolora wrote it, since its name alone could
be anybody's.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import ProLoRAError, output_error
from ...files.atomic import TEMPORARY_NAME
from ...files.managed_folder import FolderMarker
from . import basis_file
from .tables import read_table

# Part of every name of a basis: raise it when an algorithm's results change, or what a file holds.
VERSION = 3

# The first line is that of the Cache Directory Tagging Specification.
MARKER = FolderMarker(
    "CACHEDIR.TAG",
    b"""Signature: 8a477f597d28d172789f06886806bc55
# This folder was made by prolora, which deletes files in it: `prolora basis prune`.
# Everything here can be computed again. See https://bford.info/cachedir/ about this file.
""",
)

_VERSIONED = re.compile(r"v([1-9][0-9]{0,8})")
_SHELF = re.compile(r"[0-9a-f]{2}")
_BASIS = re.compile(r"[0-9a-f]{64}\.safetensors")
_TABLE = re.compile(r"(?:index|pairs|files)-[0-9a-f]{32}\.json")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheEntry:
    """One file of a cache.

    Attributes:
        path: where it is.
        kind: "basis", "table", "temporary" or "marker".
        version: of the algorithms that it was written by.
        size: bytes.
        modified: when it was written, or a basis last used, in seconds since 1970.
    """

    path: Path
    kind: str
    version: int
    size: int
    modified: float


def versioned_folder(folder: Path) -> Path:
    """Where files of this version lie in a cache folder."""
    return folder / f"v{VERSION}"


def create_versioned_folder(folder: Path) -> None:
    """Makes the folder of this version with its marker; one that holds files is left as it is.

    Raises:
        OSError: it cannot be made.
    """
    path = versioned_folder(folder)
    path.mkdir(parents=True, exist_ok=True)
    with os.scandir(path) as entries:
        if any(entries):
            return
    MARKER.put_into(path)


def list_entries(folder: Path) -> Iterator[CacheEntry]:
    """The files of a cache in `folder`, in the order of their names; what vanishes is left out."""
    for entry in _scan_folder(folder):
        match = _VERSIONED.fullmatch(entry.name)
        if match and _is_folder(entry):
            path, version = Path(entry.path), int(match[1])
            marked = MARKER.is_in(path)
            yield from _list_version(path, version, marked)
        elif _SHELF.fullmatch(entry.name) and _is_folder(entry):
            # The first version had no folder of its own.
            yield from _list_shelf(Path(entry.path), 1, False)


def remove_entries(folder: Path, entries: Iterable[CacheEntry]) -> None:
    """Deletes files of a cache, and the folders that hold nothing any more.

    Raises:
        OutputError: a file cannot be deleted.
    """
    emptied = set()
    for entry in entries:
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(entry.path, error, "cannot be removed") from error
        emptied.add(entry.path.parent)
    emptied.discard(folder)
    for path in sorted(emptied, key=lambda path: -len(path.parts)):
        for parent in (path, path.parent):
            if parent != folder:
                _remove_if_empty(parent)


def _list_version(path: Path, version: int, marked: bool) -> Iterator[CacheEntry]:
    """The files in the folder of one version."""
    for entry in _scan_folder(path):
        if _SHELF.fullmatch(entry.name) and _is_folder(entry):
            yield from _list_shelf(Path(entry.path), version, marked)
        elif _TABLE.fullmatch(entry.name):
            yield from _describe_file(entry, "table", version, marked)
        elif marked and TEMPORARY_NAME.fullmatch(entry.name):
            yield from _describe_file(entry, "temporary", version, marked)
        elif marked and entry.name == MARKER.name:
            yield from _describe_file(entry, "marker", version, marked)


def _list_shelf(path: Path, version: int, marked: bool) -> Iterator[CacheEntry]:
    """The bases whose names begin with the two digits of a shelf."""
    for entry in _scan_folder(path):
        if _BASIS.fullmatch(entry.name) and entry.name[:2] == path.name:
            yield from _describe_file(entry, "basis", version, marked)
        elif marked and TEMPORARY_NAME.fullmatch(entry.name):
            yield from _describe_file(entry, "temporary", version, marked)


def _describe_file(
    entry: os.DirEntry[str], kind: str, version: int, marked: bool
) -> Iterator[CacheEntry]:
    """The entry of a regular file that is ours, or nothing."""
    path = Path(entry.path)
    try:
        status = os.lstat(path)
    except FileNotFoundError:  # another process has removed or replaced it
        return
    if stat.S_ISREG(status.st_mode) and (marked or _was_written_by_us(path, kind)):
        yield CacheEntry(path, kind, version, status.st_size, status.st_mtime)


def _was_written_by_us(path: Path, kind: str) -> bool:
    """Whether the content of a file says that prolora wrote it."""
    try:
        if kind == "basis":
            basis_file.read_basis_header(path)
        else:
            read_table(path)
    except (ProLoRAError, OSError, ValueError):
        return False
    return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder itself and no link to one."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _scan_folder(path: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; nothing where there is none."""
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("%s: the cache folder cannot be read: %s", path, error.strerror)
        return []


def _remove_if_empty(path: Path) -> None:
    """Removes a folder without files; beside a marker that is ours there may be none either."""
    if MARKER.is_in(path) and [entry.name for entry in _scan_folder(path)] == [MARKER.name]:
        with suppress(OSError):
            (path / MARKER.name).unlink()
    with suppress(OSError):  # it holds something, or somebody has just put something there
        path.rmdir()
