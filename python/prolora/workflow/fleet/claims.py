"""Locks on the moves of a plan, for several processes that work on one folder."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


class Claims:
    """Locks on the entries of a plan: two processes do not move the same LoRA at the same time.

    A lock ends with its process, however that ends, and needs no clock. Where the file system has
    no locks every claim succeeds: results are then made twice, and the second is the first.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file whose bytes are locked, one for each entry."""
        self._number: int | None = None
        with suppress(OSError):
            self._number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def claim(self, entry: int) -> bool:
        """Whether no other process has the entry; it is this one's from now on."""
        if self._number is None or sys.platform == "win32":
            return True
        try:
            fcntl.lockf(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, entry)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True
        return True

    def release(self, entry: int) -> None:
        """Gives an entry back."""
        if self._number is not None and sys.platform != "win32":
            with suppress(OSError):
                fcntl.lockf(self._number, fcntl.LOCK_UN, 1, entry)

    def close(self) -> None:
        """Gives all entries back."""
        if self._number is not None:
            os.close(self._number)
        self._number = None
