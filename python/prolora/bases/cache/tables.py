"""Small tables beside the bases: numbers that take long to find and few bytes to keep."""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import Any

from ...errors import MissingFile
from ...files.store import put
from ...files.untrusted import open_regular

# More entries than any pair of models has weights; further ones push the oldest out.
MOST_ENTRIES = 20_000

MOST_BYTES = 64 << 20
"""More than so many entries take."""

log = logging.getLogger(__name__)


class JsonTable:
    """A table {text: JSON value} in one file, or in memory alone.

    A table that is damaged counts as empty. Processes that write one table at once lose nothing but
    entries: every one of them is true by itself, and the last file wins.
    """

    def __init__(self, path: Path | None) -> None:
        """Reads the table, if it is there; None keeps it nowhere."""
        self._path = path
        self._entries = self._load()
        self.changed = False  # since it was read or saved

    def get(self, key: str) -> Any | None:
        """Returns the entry, or None."""
        return self._entries.get(key)

    def put(self, key: str, value: Any) -> None:
        """Adds or replaces an entry; `save` keeps it."""
        if self.get(key) != value:
            self._entries[key] = value
            self.changed = True

    def save(self) -> None:
        """Writes the new entries, together with what others have written meanwhile."""
        if not self.changed or self._path is None:
            return
        self._entries = self._load() | self._entries
        self.changed = False
        newest = dict(list(self._entries.items())[-MOST_ENTRIES:])
        body = json.dumps(newest, separators=(",", ":")).encode()
        content = b"%08x\n" % zlib.crc32(body) + body
        write = lambda new: new.write_bytes(content)  # noqa: E731
        put(self._path, write, overwrite=True, durable=False, follow=False)

    def _load(self) -> dict[str, Any]:
        # Asked first, since the error of a missing input looks for similar names in the folder.
        if self._path is None or not self._path.exists():
            return {}
        try:
            with open_regular(self._path, MOST_BYTES) as file:
                checksum, _, body = file.read().partition(b"\n")
            if len(checksum) != 8 or int(checksum, 16) != zlib.crc32(body):
                raise ValueError("its content is not what was written")
            entries: dict[str, Any] = json.loads(body)
            return entries
        except MissingFile:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s is not used and will be made again: %s", self._path, error)
            return {}
