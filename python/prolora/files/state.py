"""The state of a file, which shows changes while in use."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import UnsupportedFormat, input_error

_ON_WINDOWS = os.name == "nt"


class FileState(NamedTuple):
    """What changes when a file is replaced or rewritten."""

    device: int  # number of the file system
    inode: int  # number of the file in it
    size: int  # bytes
    modified: int  # time of the last change of content, in nanoseconds since 1970
    # Time of the last change of any kind; no tool can set it. It also moves with a new name, link
    # or mode, so that it tells nothing about the content alone.
    changed: int
    # Digest of pieces of the content on Windows, where `changed` is the time of creation.
    pieces: str = ""

    @classmethod
    def from_status(cls, status: os.stat_result) -> FileState:
        """Returns the state in a result of `os.stat` or `os.fstat`."""
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )

    def has_content_of(self, other: FileState) -> bool:
        """Returns whether the file was neither replaced nor rewritten between two states."""
        return self[:4] == other[:4]


def read_state(path: Path) -> FileState:
    """Reads the state of a file; links are followed."""
    try:
        state = FileState.from_status(os.stat(path))
        return state._replace(pieces=_digest_pieces(path, state.size)) if _ON_WINDOWS else state
    except (OSError, ValueError) as error:
        raise input_error(path, error) from error


def _digest_pieces(path: Path, length: int, size: int = 1 << 12, count: int = 18) -> str:
    """Digests head, tail and sixteen pieces of a file between them."""
    digest, last = hashlib.sha256(), max(0, length - size)
    with open(path, "rb") as file:
        for i in range(count):
            file.seek(i * last // (count - 1))
            digest.update(file.read(size))
    return digest.hexdigest()


def check_unchanged(path: Path, opened: FileState, status: os.stat_result) -> None:
    """Refuses an open file that has changed since its header was read."""
    if (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != opened[:4]:
        raise UnsupportedFormat(f"{path}: was changed while it was in use; run again")


def flush_file(path: Path) -> None:
    """Makes the system write what programs changed in a file through shared memory.

    Such a change sets the file's times only if the page was written to the disk since the last one.
    After this call the next change sets them, so that what is read now can be remembered by the
    file's state. In a file system without a disk (tmpfs) it never does.
    """
    with suppress(OSError):  # not every system can, for a file that may only be read
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
