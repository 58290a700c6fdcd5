"""Files and folders that take their names only once they are whole.

Everything is built under a temporary name beside its place and renamed at the end. A process that
is killed leaves its temporary behind; the next one that writes into the folder removes it.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

TEMPORARY_NAME = re.compile(r"\.prolora-[0-9a-f]{16}\.tmp")
"""What the temporary names look like."""

# Seconds since the last write after which a temporary that nobody has locked counts as left behind:
# a process has locked its own long before; and the same where a file system knows no locks.
_STALE_SECONDS, _STALE_SECONDS_WITHOUT_LOCKS = 60, 3600
# RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS; AT_FDCWD of Linux.
_EXCHANGE, _CURRENT_FOLDER = 2, -100


@contextmanager
def replace_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """An empty file beside `path` that takes its name on success and vanishes on any failure.

    The old file stays as it is until then; its mode is kept.

    Args:
        path: the place; no symbolic link, and its folder exists.
        durable: force the data to the disk before the name, so that no crash of the machine leaves
            the name on an incomplete file.

    Raises:
        OSError: the disk is full, the folder cannot be written, …
    """
    temporary = _choose_temporary(path)
    lock = None
    try:
        # Not `tempfile`, whose files are private to the user.
        temporary.touch(0o666, exist_ok=False)
        lock = _lock(temporary)
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))
        if durable:
            _force_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        _unlock(lock)
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that takes its name on success and vanishes on any failure.

    A folder that has the name is exchanged as one: at no time does `path` hold files of both. What
    the old one holds and the new one does not is kept. One that cannot be exchanged (see
    `_must_stay`) gets the new files one by one, in the order of their names.

    Args:
        path: the place; no symbolic link, and its parent exists.

    Raises:
        OSError: the disk is full, the parent cannot be written, …
    """
    stays = path.is_dir() and _must_stay(path)
    temporary = _choose_temporary(path / "inside" if stays else path)
    lock = None
    try:
        if stays:
            remove_stale_temporaries(path)
        temporary.mkdir()
        lock = _lock(temporary)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _force_to_disk(file)
        if stays:
            for name in sorted(os.listdir(temporary)):
                os.replace(temporary / name, path / name)
        elif path.is_dir():
            _carry_over(path, temporary)
            _exchange_folders(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        _unlock(lock)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def temporary_folder(folder: Path, content: str) -> Iterator[Path]:
    """A folder for what a long piece of work keeps in the meantime; it vanishes in the end.

    What a killed process has left there is taken over, so that its work goes on.

    Args:
        folder: in which it stands.
        content: the file by which one of the same work is known.

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
    """Temporary folders with that content whose process has ended, each with its lock.

    Without locks nobody knows, and they stay until they are stale.
    """
    for path in sorted(folder.iterdir()):
        if TEMPORARY_NAME.fullmatch(path.name) and (path / content).is_file():
            with suppress(OSError):
                lock = _lock(path)
                if lock is not None:
                    yield path, lock


def remove_stale_temporaries(folder: Path) -> None:
    """Removes what killed processes have left in a folder, and nothing of a process at work.

    A temporary counts as left behind if it has exactly such a name, belongs to this user, was not
    written to for a minute, and nobody holds its lock; where there are no locks, after an hour.
    """
    with suppress(OSError):
        with os.scandir(folder) as entries:
            found = [Path(entry) for entry in entries if TEMPORARY_NAME.fullmatch(entry.name)]
        now = _read_clock(folder) if found else 0.0
        for path in found:
            with suppress(OSError):
                _remove_if_stale(path, now)


def _read_clock(folder: Path) -> float:
    """The time by the clock that dates the files of a folder, in seconds since 1970.

    On a network drive that is another one than this machine's, which may go hours before it.

    Raises:
        OSError: nothing can be written there.
    """
    trial = _choose_temporary(folder / "clock")
    try:
        trial.touch(exist_ok=False)
        return os.lstat(trial).st_mtime
    finally:
        trial.unlink(missing_ok=True)


def _choose_temporary(path: Path) -> Path:
    return path.with_name(f".prolora-{secrets.token_hex(8)}.tmp")


def _force_to_disk(file: Path) -> None:
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


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


def _remove_if_stale(path: Path, now: float) -> None:
    """Removes a temporary if it was left behind.

    Args:
        path: of the temporary.
        now: by the clock that dated it.

    Raises:
        OSError: it is somebody else's, or just gone.
    """
    status = os.lstat(path)
    age = now - max(status.st_mtime, status.st_ctime)
    is_folder = stat.S_ISDIR(status.st_mode)
    mine = sys.platform == "win32" or status.st_uid == os.getuid()
    if not mine or age < _STALE_SECONDS or not (is_folder or stat.S_ISREG(status.st_mode)):
        return
    lock = _lock(path)
    try:
        if lock is None and age < _STALE_SECONDS_WITHOUT_LOCKS:
            return
        if is_folder:
            # Only what was being built, or what an exchange has replaced: see `replace_folder`.
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        _unlock(lock)


def _must_stay(folder: Path) -> bool:
    """Whether a folder cannot give its name to another one.

    It holds the current folder, which whoever stands there would lose; something is mounted on it;
    or nothing can be written beside it.
    """
    with suppress(OSError):  # the current folder may be gone
        here = Path(os.path.realpath(os.getcwd()))
        if any(os.path.samefile(folder, above) for above in (here, *here.parents)):
            return True
    return os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)


def _carry_over(old: Path, new: Path) -> None:
    """Gives the new folder what only the old one holds, by hard links where those exist."""

    def skip(folder: str, names: list[str]) -> list[str]:
        if Path(folder) != old:
            return []
        return [n for n in names if os.path.lexists(new / n) or TEMPORARY_NAME.fullmatch(n)]

    shutil.copytree(
        old, new, symlinks=True, ignore=skip, copy_function=_link_or_copy, dirs_exist_ok=True
    )


def _link_or_copy(source: str, copy: str) -> None:
    try:
        os.link(source, copy)
    except OSError:
        shutil.copy2(source, copy)


def _exchange_folders(new: Path, old: Path) -> None:
    """Gives two folders each other's names."""
    if _exchange_names(new, old):
        return
    # Without that call of the system there is a moment in which nothing has the name. The old
    # folder stands under a name that no clean-up touches until the new one is in place.
    aside = old.with_name(f"{old.name}.old-{secrets.token_hex(4)}")
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except BaseException:
        os.replace(aside, old)
        raise
    os.replace(aside, new)


def _exchange_names(one: Path, other: Path) -> bool:
    """Whether the system has exchanged two names in one step."""
    first, second = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(library.renamex_np(first, second, _EXCHANGE) == 0)
        here = _CURRENT_FOLDER
        return bool(library.renameat2(here, first, here, second, _EXCHANGE) == 0)
    except (AttributeError, OSError, TypeError):  # no such call, or no such library
        return False
