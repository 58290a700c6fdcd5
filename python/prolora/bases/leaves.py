"""Digests of a file's tensors, taken while these are read."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from torch import Tensor

from ..errors import OutputError, UnsupportedFormat
from ..files.gguf_file import GgufFile
from ..files.hashing import hash_file, hash_parts
from ..files.safetensors_file import SafetensorsFile
from ..files.state import FileState, flush_file, read_state
from ..files.store import Store
from .cache.tables import JsonTable

TensorFile = SafetensorsFile | GgufFile
"""A file of tensors whose header was read and checked."""

# Two writes within one tick of a file system's clock leave the same times: what is read of a file
# that changed so shortly before (ns) is remembered by nobody else.
SETTLING_TIME = 2_000_000_000
_WHOLE = ""  # the entry of a file's own digest beside those of its tensors

_known: dict[str, JsonTable] = {}
_MOST_PENDING = 2  # tensors of a file that wait for their digest: they stay in memory so long


@cache
def _open_worker() -> ThreadPoolExecutor:
    """Opens the one thread that takes digests beside the work; hashing releases the GIL."""
    return ThreadPoolExecutor(1, "prolora-digests")


if hasattr(os, "register_at_fork"):  # a forked process has no such thread
    os.register_at_fork(after_in_child=_open_worker.cache_clear)


def is_settled(state: FileState) -> bool:
    """Returns whether a change from now on must show in the state of a file."""
    return time.time_ns() - max(state.modified, state.changed) > SETTLING_TIME


def open_memory(path: Path, state: FileState, folder: Path | None) -> JsonTable:
    """Returns the digests that are remembered of a file in this state.

    `folder` remembers digests between runs; with None only this process does.
    """
    name = f"{os.path.realpath(path)} {' '.join(map(str, state))}"
    file = None if folder is None else Store(folder).path("files", name, suffix=".json")
    if (key := f"{folder} {name}") not in _known:
        _known[key] = JsonTable(file)
    return _known[key]


def digest_file(path: Path, folder: Path | None = None) -> str:
    """Returns the SHA-256 of a file, read once for each of its states.

    `folder` as for `open_memory`.

    Raises:
        UnsupportedFormat: it cannot be read, or is changed meanwhile.
    """
    flush_file(path)
    state = read_state(path)
    memory = open_memory(path, state, folder)
    if recorded := memory.get(_WHOLE):
        return str(recorded)
    digest = hash_file(path)
    if read_state(path) != state:
        raise UnsupportedFormat(f"{path}: was changed while it was in use; run again")
    if is_settled(state):
        memory.put(_WHOLE, digest)
        save_memory(memory)
    return digest


def save_memory(memory: JsonTable) -> None:
    """Writes what is remembered; where that fails, nothing is lost but time."""
    with suppress(OSError, OutputError):
        memory.save()


class Leaves:
    """The digests of one file's tensors, and their use.

    Attributes:
        file: the file.
        beside: the index of its shards.
        records: where tensors are noted that are read; `always` where there is none.
    """

    def __init__(self, file: TensorFile, beside: Path | None = None) -> None:
        """Takes no digest yet: most work needs none."""
        self.file, self.beside = file, beside
        self._digests: dict[str, str] = {}
        self._pending: dict[str, tuple[int, Tensor, Future[str]]] = {}
        self._memory: JsonTable | None = None  # None while no digest is wanted
        self._settled = False
        self.always: set[str] = set()
        self.records: list[set[str]] = []

    def remember(self, folder: Path | None) -> None:
        """Recalls digests of the file as it is now; later reads take more."""
        flush_file(self.file.path)  # or changes of a file that is mapped set no times
        state = read_state(self.file.path)
        self._digests, self._settled = {}, is_settled(state)
        self._memory = open_memory(self.file.path, state, folder)

    def read(self, key: str) -> Tensor:
        """Reads a tensor; takes its digest where one is wanted."""
        self.note(key)
        if self._memory is None or (self._settled and self.recall(key)):
            return self.file.read(key)
        return self.file.read(key, lambda raw: self._begin(key, raw))

    def digest(self, key: str) -> str:
        """Returns the digest of a tensor's bytes; reads them if it is not known."""
        digests = [self.recall(key)]
        if digests[0] is None:
            self.file.read(key, lambda raw: digests.insert(0, self._keep(key, hash_parts([raw]))))
        return str(digests[0])

    def recall(self, key: str) -> str | None:
        """Returns the digest of a tensor, if it is known."""
        self._settle(key)
        recorded = self._digests.get(key) or (self._memory and self._memory.get(f"tensor {key}"))
        return recorded if isinstance(recorded, str) else None

    def note(self, key: str) -> None:
        """Notes that work depends on a tensor, read or known."""
        for used in self.records or [self.always]:
            used.add(key)

    def save(self) -> None:
        """Writes new digests into the folder that remembers them."""
        self._settle(*self._pending)
        if self._memory is not None:
            save_memory(self._memory)

    def _begin(self, key: str, raw: Tensor) -> None:
        """Begins to take the digest of a tensor that is in use already."""
        self._settle(key, *list(self._pending)[: 1 - _MOST_PENDING])
        self._pending[key] = os.getpid(), raw, _open_worker().submit(hash_parts, [raw])

    def _settle(self, *keys: str) -> None:
        """Waits for digests that were begun."""
        for key in keys:
            if (pending := self._pending.pop(key, None)) is not None:
                process, raw, digest = pending
                # A forked process has what was begun, and not the thread that would end it.
                own = process == os.getpid()
                self._keep(key, digest.result() if own else hash_parts([raw]))

    def _keep(self, key: str, digest: str) -> str:
        """Keeps a digest; refuses one that differs from what was read before."""
        if self._memory is not None:
            if self._digests.setdefault(key, digest) != digest:
                path = self.file.path
                raise UnsupportedFormat(f"{path}: was changed while it was in use; run again")
            if self._settled:
                self._memory.put(f"tensor {key}", digest)
        return digest
