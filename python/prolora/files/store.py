"""Outputs that take their names once complete, and names by content.

There is one rule for all that is written: what exists is refused unless the caller says
`overwrite`. Two processes that write one name never replace each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError, OutputExists, UnsupportedFormat, output_error

StrPath = str | os.PathLike[str]

TEMPORARY_NAME = re.compile(r"\.prolora-[0-9a-f]{16}\.tmp")
"""A name under which something is written until it is whole."""

_ON_WINDOWS = os.name == "nt"
# On NTFS a colon would begin a hidden stream of another file.
_FORBIDDEN = '<>:"|?*'
# Seconds after the last write from which a temporary counts as left behind by a killed process.
_STALE_SECONDS = 3600
# A name is given within milliseconds: a lock that is older (s) was left by a killed process.
_LOCK_SECONDS = 5
# Pauses (s) until a file that is open is given up: others' tables are open for milliseconds.
_WAITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_swept: set[Path] = set()  # folders in which this process has looked for such


def digest(made_of: object) -> str:
    """Returns the SHA-256, in hexadecimal, of facts that JSON can hold; their order is nothing."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """A folder with names that are digests of what determines the content."""

    folder: Path

    def path(
        self,
        kind: str,
        made_of: object,
        *,
        title: str = "",
        digits: int = 32,
        suffix: str = ".safetensors",
    ) -> Path:
        """Returns where something belongs by what determines it.

        `kind` is a folder below the store; people read `title` before the digits.
        """
        words = re.sub(r"[^\w.-]+", "_", title)[:80].strip("._")
        name = digest(made_of)[:digits]
        return self.folder / kind / f"{words}{'-' if words else ''}{name}{suffix}"

    def refuse(self, path: Path, error: Exception, **facts: str) -> None:
        """Writes a note beside a path on why its content was not made."""
        document = {"error": getattr(error, "code", type(error).__name__), "message": str(error)}
        put_text(failure_note(path), json.dumps(facts | document, indent=1) + "\n", overwrite=True)


def failure_note(path: Path) -> Path:
    """Returns the file that says why a path was not made."""
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.failed.json")


def put(
    path: StrPath,
    write: Callable[[Path], object],
    *,
    overwrite: bool = False,
    folder: bool = False,
    durable: bool = True,
    follow: bool = True,
) -> None:
    """Writes a file or folder under a temporary name, then renames it.

    Args:
        path: of the output; a missing folder around it is made, and vanishes if the output is not
            written.
        write: fills an empty file or folder of another name, and may read it back.
        overwrite: replace a file of that name; in a folder, the files of the same names (a process
            that is killed meanwhile leaves old ones as `NAME.old`).
        folder: make a folder.
        durable: force the data to the disk before the name, so that no crash of the machine leaves
            the name on an incomplete file.
        follow: a symbolic link of that name stands for its destination; else it is replaced.

    Raises:
        OutputExists: something has that name, also if it came while this was written.
        OutputError: it cannot be written, or cannot be read back; what was there is untouched.
    """
    check_free(path, overwrite=overwrite, folder=folder)
    if not follow and os.path.islink(path):
        os.unlink(path)
    place = Path(os.path.realpath(path))
    temporary = place.with_name(f".prolora-{secrets.token_hex(8)}.tmp")
    try:
        with _make_folder(place.parent):
            try:
                if folder:
                    temporary.mkdir()
                else:  # not by `tempfile`, whose files are private to the user
                    temporary.touch(0o666, exist_ok=False)
                if place.parent not in _swept:
                    _swept.add(place.parent)
                    # By the clock of these files: that of a network drive may be hours ahead.
                    remove_stale(place.parent, temporary.stat().st_mtime - _STALE_SECONDS)
                write(temporary)
                if durable:
                    _force_to_disk(temporary)
                _give_name(temporary, place, overwrite)
            finally:
                _remove(temporary)
    except UnsupportedFormat as error:
        raise OutputError(f"{path}: was not written: {error}") from error
    except OSError as error:
        raise output_error(path, error) from error


def put_text(path: StrPath, text: str, *, overwrite: bool = False) -> None:
    """Writes a text as UTF-8, completely or not at all; arguments as for `put`."""
    content = replace_surrogates(text).encode()
    put(path, lambda temporary: temporary.write_bytes(content), overwrite=overwrite)


def replace_surrogates(text: str) -> str:
    """Replaces each byte of a file name that is not UTF-8 by "?"."""
    return text.encode("utf-8", "replace").decode()


def check_free(
    path: StrPath,
    inputs: Iterable[StrPath] = (),
    *,
    overwrite: bool = False,
    folder: bool = False,
) -> None:
    """Refuses an output path before any work is done for it; see `put`.

    No input is overwritten. A folder may exist if it is empty.

    Raises:
        OutputExists: something has that name.
        OutputError: the folder around it cannot be made or written, `path` is something of another
            kind, or it is or holds one of `inputs` (also through a symbolic or hard link).
    """
    try:
        place = Path(os.path.realpath(path))
        if os.path.islink(path) and not place.parent.is_dir():
            raise OutputError(f"{path}: is a link into a folder that does not exist: {place}")
        around = next((x for x in (*place.parents, place) if os.path.lexists(x)), None)
        if around is None:  # on Windows alone
            raise OutputError(f"{path}: there is no drive {place.anchor}; check the path")
        if not around.is_dir():
            raise OutputError(f"{path}: {around} is a file, not a folder; choose another name")
        if _ON_WINDOWS and (len(place.name) > 255 or set(place.name) & set(_FORBIDDEN)):
            letters = " ".join(_FORBIDDEN)
            raise OutputError(f"{path}: Windows takes no such name: too long, or with {letters}")
        if not os.access(around, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: the folder {around} cannot be written")
        try:
            mode = os.lstat(place).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode) and not folder:
            raise OutputError(f"{path}: is a folder; name a file in it")
        if not (stat.S_ISREG(mode) or folder):
            raise OutputError(f"{path}: is not a regular file")
        if folder and not stat.S_ISDIR(mode):
            raise OutputError(f"{path}: a folder is written, and a file stands there")
        _check_inputs(path, place, inputs)
        if not overwrite and not (folder and not os.listdir(place)):
            raise OutputExists(
                f"{path}: exists, and is not replaced; choose another name, or allow it with "
                "`overwrite=True`"
            )
        if not os.access(place, os.W_OK):
            raise OutputError(f"{path}: exists and is write-protected")
        if _ON_WINDOWS and not folder:
            _rename(place, place, False)  # refused while another program has it open
    except (OSError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise output_error(path, error) from error


def _check_inputs(path: StrPath, place: Path, inputs: Iterable[StrPath]) -> None:
    """Refuses an output that exists and is an input, lies in one, or holds one."""
    for source in map(Path, inputs):
        real = Path(os.path.realpath(source))
        if place in real.parents:
            raise OutputError(f"{path}: holds the input {source}; name a folder of its own")
        inside = real in place.parents and real.is_dir()
        if inside or (real.exists() and os.path.samefile(real, place)):
            raise OutputError(f"{path}: would overwrite the input {source}")


def _give_name(temporary: Path, place: Path, overwrite: bool) -> None:
    try:
        if temporary.is_dir() and overwrite and place.is_dir():
            # A reader needs the last (a PEFT folder's weights): it never finds files of both. Until
            # the new ones are there, a kill leaves the old ones, maybe as NAME.old.
            names = sorted(os.listdir(temporary))
            old = [name for name in reversed(names) if (place / name).exists()]
            try:
                for name in old:
                    _rename(place / name, place / f"{name}.old")
                for name in names:
                    _rename(temporary / name, place / name)
            except OSError:  # another program has one open, on Windows
                for name in names:
                    if name not in old:
                        _remove(place / name)
                    elif (place / f"{name}.old").exists():
                        os.replace(place / f"{name}.old", place / name)
                raise
            for name in names:  # those of a run that was killed, too
                _remove(place / f"{name}.old")
        elif overwrite and not temporary.is_dir():
            if place.exists():
                temporary.chmod(stat.S_IMODE(place.stat().st_mode))
            _rename(temporary, place)
        elif temporary.is_dir() or _ON_WINDOWS:
            with suppress(OSError):  # elsewhere a folder replaces an empty one
                place.rmdir()
            _rename(temporary, place, overwrite)
        else:
            _link(temporary, place)
    except OSError as error:
        if not overwrite and os.path.lexists(place):
            raise OutputExists(f"{place}: was written by another process meanwhile") from error
        raise


def _rename(old: Path, new: Path, overwrite: bool = True) -> None:
    """Renames; on Windows it waits while a reader or a virus scanner has one of both open."""
    rename = os.replace if overwrite else os.rename
    for seconds in _WAITS if _ON_WINDOWS else ():
        try:
            return rename(old, new)
        except PermissionError:
            time.sleep(seconds)
    return rename(old, new)


def _link(temporary: Path, place: Path) -> None:
    """Links a file to a name that nothing has."""
    try:
        os.link(temporary, place)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        lock = place.with_name(f".{place.name}.lock")
        with suppress(OSError):  # a killed process left it, by the clock of these files
            if lock.stat().st_mtime < temporary.stat().st_mtime - _LOCK_SECONDS:
                lock.unlink()
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        try:
            if os.path.lexists(place):
                raise FileExistsError(place) from None
            os.rename(temporary, place)
        finally:
            lock.unlink()


def _force_to_disk(temporary: Path) -> None:
    files = filter(Path.is_file, temporary.rglob("*")) if temporary.is_dir() else [temporary]
    for file in files:
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_stale(folder: Path, before: float) -> None:
    """Removes temporaries of a folder that were last written before a time, in seconds."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if TEMPORARY_NAME.fullmatch(entry.name) and entry.stat().st_mtime < before:
                _remove(Path(entry))


@contextmanager
def _make_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and those around it; on a failure those that are still empty vanish."""
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for created in missing:
            with suppress(OSError):
                created.rmdir()
        raise
