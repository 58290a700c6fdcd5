"""Locks on the moves of a plan, for several processes that work on one folder."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# More entries than any plan has.
_ROUND = 1 << 40


class Claims:
    """Locks on the entries of a plan: two processes do not move the same LoRA at the same time.

    A lock ends with its process, however that ends, and needs no clock. What a process holds that
    does not get on any more can be taken over: all who wait for it then lock other bytes. Where the
    file system has no locks every claim succeeds: results are then made twice, and the second is
    the first.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file whose bytes are locked, one for each entry."""
        self._number: int | None = None
        self._first = 0
        with suppress(OSError):
            self._number = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)

    def take_over(self) -> None:
        """From now on, what others have claimed until now is nobody's."""
        self._first += _ROUND

    def claim(self, entry: int) -> bool:
        """Whether no other process has the entry; it is this one's from now on."""
        if self._number is None or sys.platform == "win32":
            return True
        try:
            fcntl.lockf(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._first + entry)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True
        return True

    def release(self, entry: int) -> None:
        """Gives an entry back."""
        if self._number is not None and sys.platform != "win32":
            with suppress(OSError):
                fcntl.lockf(self._number, fcntl.LOCK_UN, 1, self._first + entry)

    def close(self) -> None:
        """Gives all entries back."""
        if self._number is not None:
            os.close(self._number)
        self._number = None
