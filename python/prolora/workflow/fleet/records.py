"""What became of the moves of a plan: lines that processes append to files of their own."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ...errors import ProLoRAError, UnsupportedFormat, output_error
from ...files.jsontext import parse_json_object, replace_nonfinite
from ...files.managed_folder import ManagedFolder, is_component
from ...files.outside import open_regular, read_fields
from .plan import Entry
from .result_folder import JOURNALS, RESULTS

if sys.platform != "win32":
    import fcntl

# Bytes; a line of ours has some hundred.
_LINE_LIMIT = 1 << 20
# Between two signs of life of a process: a file system need not note more of them.
_TOUCH_SECONDS = 1.0

log = logging.getLogger(__name__)

Status = Literal["done", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one move.

    Attributes:
        key: of the entry (`Plan.key`).
        lora: the input.
        source, target: labels of the bases.
        status: "done"; "failed"; or "stopped" where nothing can be written any more, so that the
            run ends and the entry stays as it was.
        out: the result, below the folder of the results; "" if there is none.
        size: bytes of the result; of a folder, of its weights.
        error: why it failed, as `ProLoRAError.to_dict` has it.
        transient: whether it may succeed another time: the system failed, not the LoRA.
        seconds: wall time; of what was done for several LoRAs at once, its share.
        method: how it was moved.
        verdict: by the weights of the two bases: "go"; "weak" where the target has learnt much that
            is new; "no-go" where they have nothing in common; "" if nothing was measured.
        coverage: share of the LoRA's modules that moved, 0 … 1; None if it is not known.
        energy: share of the LoRA's energy that is on the target; None if it is not known.
        kept: whether the result was there already.
        unread: updates of the LoRA that could not be read and stay behind.
        at: seconds since the process began, by its own clock.
    """

    key: str
    lora: str
    source: str
    target: str
    status: Status
    out: str = ""
    size: int = 0
    error: dict[str, str] = field(default_factory=dict)
    transient: bool = False
    seconds: float = 0.0
    method: str = ""
    verdict: str = ""
    coverage: float | None = None
    energy: float | None = None
    kept: bool = False
    unread: int = 0
    at: float = 0.0

    @property
    def reason(self) -> str:
        """Why it failed, in words."""
        return self.error.get("message", "")

    def to_line(self) -> str:
        """As a line of JSON; fields that say nothing are left out."""
        line = {k: v for k, v in asdict(self).items() if v not in ("", None, False, {})}
        return json.dumps(replace_nonfinite(line)) + "\n"

    @classmethod
    def from_dict(cls, line: Mapping[str, Any], where: str) -> Record:
        """Reads what `to_line` wrote; what another version adds is passed over.

        Raises:
            UnsupportedFormat: it is no such line, or its result lies elsewhere than results do.
        """
        known = {f.name: line[f.name] for f in fields(cls) if f.name in line}
        if isinstance(name := known.get("error"), str):  # of an earlier journal, words beside it
            known["error"] = {"type": name, "code": ProLoRAError.code}
            known["error"]["message"] = line.get("reason", "")
        record = read_fields(cls, known, where)
        if record.out and not _is_place(record.out):
            raise UnsupportedFormat(f"{where}: is damaged: no result lies at {record.out!r:.80}")
        return record

    def after(self, seconds: float) -> Record:
        """The record as the process that began `seconds` ago writes it down."""
        return replace(self, at=round(seconds, 3))

    @classmethod
    def of_failure(cls, key: str, entry: Entry, error: ProLoRAError) -> Record:
        """The record of an entry that an error ended."""
        return cls(
            key,
            entry.lora,
            entry.pair.source,
            entry.pair.target,
            "failed",
            error=error.to_dict(),
            transient=is_transient(error),
        )


def _is_place(out: str) -> bool:
    """Whether a path is one that results have: RESULTS/TARGET/NAME."""
    first, *names = out.split("/")
    if first != RESULTS or len(names) != 2:
        return False
    return is_component(names[0]) and names[1] not in ("", ".", "..")


def is_transient(error: BaseException) -> bool:
    """Whether the system failed, so that another try may succeed."""
    causes = (error, error.__cause__)
    return any(isinstance(one, OSError | MemoryError | RuntimeError) for one in causes)


class Journal:
    """The file of this process, open for more lines; a lock shows others that it is at work.

    Attributes:
        path: of the file.
        began: when, by the clock that `seconds` is measured with.
        count: records so far.
    """

    def __init__(self, folder: ManagedFolder, head: Mapping[str, Any]) -> None:
        """Begins a file.

        Args:
            folder: of the results.
            head: about the run: the plan's digest, the shard.

        Raises:
            OutputError: it cannot be written.
        """
        host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
        name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self.path = folder.make_folder(JOURNALS) / name
        self.began = self._touched = time.monotonic()
        self.count = 0
        about = {"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        try:
            self._file = open(self.path, "x", encoding="utf-8", buffering=1)
        except OSError as error:
            raise output_error(self.path, error) from error
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                pass  # a file system without locks: nobody is told that this process is at work
        self._append(json.dumps({"journal": 1, **about, **head}) + "\n")

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def add(self, record: Record) -> None:
        """Appends a record.

        Raises:
            OutputError: it cannot be written.
        """
        self._append(record.to_line())
        self.count += 1

    def touch(self) -> None:
        """Shows others that this process gets on, by the time of its file."""
        if time.monotonic() - self._touched >= _TOUCH_SECONDS:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)

    def _append(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise output_error(self.path, error) from error

    def close(self) -> None:
        """Ends the file, and with it the lock; one without a record goes, if it is not the only."""
        try:
            self._file.close()
            if not self.count and any(p != self.path for p in self.path.parent.glob("*.jsonl")):
                self.path.unlink()
        except OSError as error:
            raise output_error(self.path, error) from error


@dataclass
class _Tail:
    """How far a journal was read."""

    offset: int = 0
    head: dict[str, Any] | None = None


class JournalReader:
    """All journals of a folder, read line by line as they grow."""

    def __init__(self, folder: Path) -> None:
        """Reads nothing yet."""
        self.folder = folder / JOURNALS
        self._tails: dict[Path, _Tail] = {}

    def read_new(self) -> Iterator[tuple[Path, Record]]:
        """What was added since the last call; a line that is still being written waits."""
        for path in self.list_files():
            tail = self._tails.setdefault(path, _Tail())
            try:
                with open_regular(path) as file:
                    file.seek(tail.offset)
                    for line in _read_lines(file):
                        tail.offset += len(line)
                        record = _read_line(line, tail, path)
                        if record is not None:
                            yield path, record
            except (OSError, UnsupportedFormat):
                continue  # gone, no file, or on a drive that comes back later

    def list_files(self) -> list[Path]:
        """The journals, that which was written to last at the end.

        Their file system has one clock, whatever those of the processes say.
        """
        try:
            return sorted(self.folder.glob("*.jsonl"), key=lambda path: (find_time(path), path))
        except OSError:
            return []

    def find_head(self, path: Path) -> dict[str, Any]:
        """What a journal that was read says of its run."""
        tail = self._tails.get(path)
        return (tail.head if tail else None) or {}


def find_time(path: Path) -> int:
    """When a file was last written to, in nanoseconds; 0 if it cannot be reached."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that are whole; what follows one that is too long is none of ours."""
    while (line := file.readline(_LINE_LIMIT)).endswith(b"\n"):
        yield line


def _read_line(line: bytes, tail: _Tail, path: Path) -> Record | None:
    """The record of a line; the first line of a journal is about its run."""
    try:
        content = parse_json_object(line, f"{path}, the line that ends at byte {tail.offset}")
        if "journal" in content:
            tail.head = content
            return None
        return Record.from_dict(content, f"{path}, the line that ends at byte {tail.offset}")
    except UnsupportedFormat as error:
        log.warning("%s; it does not count", error)
        return None


def is_at_work(journal: Path) -> bool:
    """Whether the process that writes a journal still runs; False where there are no locks."""
    if sys.platform == "win32":
        return False
    try:
        with open_regular(journal) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, UnsupportedFormat):
        return False
    return False
