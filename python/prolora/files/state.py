"""The state of a file, by which a change while it is in use is noticed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import UnsupportedFormat, input_error


class FileState(NamedTuple):
    """What changes when a file is replaced or rewritten.

    Attributes:
        device: number of the file system.
        inode: number of the file in it.
        size: bytes.
        modified: time of the last change of content, in nanoseconds since 1970.
        changed: time of the last change of any kind; no tool can set it. It also moves with a new
            name, link or mode, so that it tells nothing about the content alone.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def from_status(cls, status: os.stat_result) -> FileState:
        """The state in what `os.stat` or `os.fstat` gives."""
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )

    def has_content_of(self, other: FileState) -> bool:
        """Whether nobody has replaced or rewritten the file between the two states."""
        return self[:4] == other[:4]


def read_state(path: Path) -> FileState:
    """The state of a file; links are followed.

    Raises:
        UnsupportedFormat: there is no such file, or it cannot be reached.
    """
    try:
        return FileState.from_status(os.stat(path))
    except (OSError, ValueError) as error:
        raise input_error(path, error) from error


def check_unchanged(path: Path, opened: FileState, file_number: int) -> None:
    """Refuses a file that is not in the state any more in which its header was read.

    Args:
        path: for the message.
        opened: its state then.
        file_number: of the open file.

    Raises:
        UnsupportedFormat: somebody has replaced or rewritten it.
    """
    if not FileState.from_status(os.fstat(file_number)).has_content_of(opened):
        raise UnsupportedFormat(f"{path}: was changed while it was in use; run again")


def flush_file(path: Path) -> None:
    """Has the system write what programs have changed in a file through memory shared with it.

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
