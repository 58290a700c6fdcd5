"""Whether a folder is the same one on every node: a file that the driver makes is looked for."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path

from ....errors import output_error

# How long a network drive may take to show a new file.
_SETTLING_SECONDS = 2.0


class FolderMark:
    """A file of a random name in a folder.

    It looks like a temporary of ours, so that what a killed driver leaves is removed by the next
    run that writes into the folder. Therefore it is renewed before each look.
    """

    def __init__(self, folder: Path) -> None:
        """Chooses the name; the folder is made by `renew`."""
        self.path = folder.absolute() / f".prolora-{secrets.token_hex(8)}.tmp"

    def renew(self) -> Path:
        """Makes the file, or makes it new again.

        Raises:
            OutputError: the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise output_error(self.path.parent, error) from error
        return self.path

    def remove(self) -> None:
        """Removes the file."""
        with suppress(OSError):
            self.path.unlink()


def sees_mark(mark: Path) -> bool:
    """Whether the folder of this name on this machine is the one with the mark."""
    deadline = time.monotonic() + _SETTLING_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline or not mark.parent.exists():
            return False
        time.sleep(0.1)
    return True
