"""Files and folders that take their names only once complete.

Everything is built under a temporary name beside its path and renamed at the end. A killed process
leaves its temporary behind; the next output of `store` in that folder removes it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

TEMPORARY_NAME = re.compile(r"\.prolora-[0-9a-f]{16}\.tmp")
"""What the temporary names look like."""


@contextmanager
def temporary_folder(folder: Path, content: str) -> Iterator[Path]:
    """Yields a folder for the intermediate results of long work.

    It vanishes in the end. What a killed process has left there is taken over, so that its work
    goes on: `content` is the file by which one of the same work is known.

    Raises:
        OSError: it cannot be made.
    """
    path, lock = next(_take_over(folder, content), (None, None))
    if path is None:
        path = _choose_temporary(folder / content)
        path.mkdir()
        lock = _lock(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _unlock(lock)


def _take_over(folder: Path, content: str) -> Iterator[tuple[Path, int]]:
    """Yields (temporary folder, lock) of ended processes with that content.

    Without locks no process is known to have ended, and they stay until they are stale.
    """
    for path in sorted(folder.iterdir()):
        if TEMPORARY_NAME.fullmatch(path.name) and (path / content).is_file():
            with suppress(OSError):
                lock = _lock(path)
                if lock is not None:
                    yield path, lock


def _choose_temporary(path: Path) -> Path:
    return path.with_name(f".prolora-{secrets.token_hex(8)}.tmp")


def _lock(path: Path) -> int | None:
    """Takes a lock that ends with this process; None where the file system knows none.

    Raises:
        BlockingIOError: another process holds it.
    """
    if sys.platform == "win32":  # an open file could not be renamed there
        return None
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(number)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return number


def _unlock(number: int | None) -> None:
    if number is not None:
        os.close(number)
