"""Folders that prolora manages, told from all others by a marker that is made with them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError, output_error
from .atomic import replace_file
from .store import put_text


@dataclass(frozen=True)
class FolderMarker:
    """The file that says that prolora manages the folder it lies in.

    Attributes:
        name: of the file.
        text: what it begins with.
    """

    name: str
    text: bytes

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has the marker: a file with its text, and no link to one."""
        path = folder / self.name
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                return False
            with open(path, "rb") as file:
                return file.read(len(self.text)) == self.text
        except OSError:
            return False

    def put_into(self, folder: Path) -> None:
        """Marks a folder.

        Raises:
            OSError: it cannot be written.
        """
        with replace_file(folder / self.name, durable=False) as temporary:
            temporary.write_bytes(self.text)


@dataclass(frozen=True)
class ManagedFolder:
    """A folder with a marker, in which some names are prolora's.

    Attributes:
        path: of the folder, absolute.
        marker: what says that prolora manages it.
    """

    path: Path
    marker: FolderMarker

    @classmethod
    def make(
        cls, path: str | os.PathLike[str], marker: FolderMarker, names: Iterable[str] | None = None
    ) -> ManagedFolder:
        """Makes a folder, or takes one that is there, as long as none of the names is a stranger's.

        Args:
            path: of the folder.
            marker: it gets this one.
            names: what prolora writes into it; None takes no folder with files of others, hidden
                ones aside.

        Raises:
            OutputError: it cannot be made, or holds one of the names and no marker.
        """
        folder = Path(os.path.abspath(path))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # In this order: another process marks the folder before it writes into it.
            if names is None:
                taken = sorted(name for name in os.listdir(folder) if not name.startswith("."))
            else:
                taken = [name for name in names if os.path.lexists(folder / name)]
            if not marker.is_in(folder):
                if taken or os.path.lexists(folder / marker.name):
                    name = taken[0] if taken else marker.name
                    raise OutputError(
                        f"{folder}: holds {name}, which prolora did not write there (the folder "
                        f"has no {marker.name} of it); name another folder"
                    )
                marker.put_into(folder)
        except (OSError, ValueError) as error:
            if isinstance(error, OutputError):
                raise
            raise output_error(folder, error, "the folder of the results cannot be made") from error
        return cls(folder, marker)

    def find_place(self, *names: str) -> Path:
        """The path of something in the folder, refused where it leads through a link.

        Args:
            *names: one component each.

        Raises:
            OutputError: a component is a symbolic link.
        """
        place = self.path
        for name in names:
            place = place / name
            if place.is_symlink():
                raise OutputError(f"{place}: is a link, which is not followed; remove it")
        return place

    def make_folder(self, *names: str) -> Path:
        """A folder below, made where it is not there.

        Raises:
            OutputError: it cannot be made, or leads through a link.
        """
        place = self.find_place(*names)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(place, error, "cannot be made") from error
        return place

    def write_text(self, name: str, text: str) -> None:
        """Writes a file in the folder, or replaces it where the folder has its marker.

        Raises:
            OutputError: it cannot be written, is a link, or is a stranger's.
        """
        place = self.find_place(name)
        if os.path.lexists(place) and not self.marker.is_in(self.path):
            raise OutputError(f"{place}: exists, and prolora did not write it; name another folder")
        put_text(place, text, overwrite=True)


def is_component(name: str) -> bool:
    """Whether a text is one component of a path on every system, and can be printed."""
    if name in (".", "..") or any(character in name for character in '/\\:*?"<>|'):
        return False
    return bool(name) and name.isprintable() and len(name.encode()) <= 200
