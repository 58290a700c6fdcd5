"""Open files for threads and forked processes."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from ..errors import UnsupportedFormat, input_error


class SharedFile:
    """An open file that is read by position.

    Its own position is shared by all children of a fork. It is closed with its last reader.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file unbuffered, so that reads go straight into the caller's memory.

        Raises:
            UnsupportedFormat: it cannot be opened, or is a pipe or device, which would block.
        """
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UnsupportedFormat(f"{path}: not a file; a .safetensors file is needed")
            self._file, self._path = open(path, "rb", buffering=0), path
        except (OSError, ValueError) as error:
            raise input_error(path, error) from error
        # A lock that a thread has at a fork stays locked in the child; systems without reads by
        # position have no fork.
        self._lock = None if hasattr(os, "preadv") else threading.Lock()

    def __del__(self) -> None:
        """Closes the file with its last reader."""
        if hasattr(self, "_file"):
            self.close()

    def close(self) -> None:
        """Closes the file at once."""
        self._file.close()

    def __reduce__(self) -> tuple[type[SharedFile], tuple[Path]]:
        """Returns what opens it again in a spawned process."""
        return SharedFile, (self._path.absolute(),)

    def status(self) -> os.stat_result:
        """Returns the file's size and times."""
        return os.fstat(self._file.fileno())

    def fill(self, view: memoryview, start: int) -> bool:
        """Fills `view` [bytes] from byte `start`; returns False where the file ends inside.

        Raises:
            OSError: it cannot be read.
        """
        while view:
            if self._lock is None:
                count = os.preadv(self._file.fileno(), [view], start)
            else:
                with self._lock:
                    self._file.seek(start)
                    count = self._file.readinto(view) or 0
            if not count:
                return False
            view, start = view[count:], start + count
        return True

    def read(self, start: int, most: int) -> bytes:
        """Returns `most` bytes from byte `start`, fewer at the end of the file.

        Raises:
            OSError: it cannot be read.
        """
        buffer = bytearray(max(0, min(most, self.status().st_size - start)))
        return bytes(buffer) if self.fill(memoryview(buffer), start) else b""
