"""Subspaces kept on disk: they belong to a base model alone, so the second LoRA finds them there.

A file for each weight, named by the content of the tensor and by what was asked of it: fine-tunes
that share a tensor share its file, and a renamed checkpoint finds its own. A file that is damaged,
foreign or of another version is recomputed and never trusted.

So that a weight need not be read to learn its name, an index remembers which content lies where: a
file that has the inode, size and times it had when its tensors were hashed has them still. Beside
it lie the few numbers that a transfer wants to know of pairs of weights.

Checksums are against accidents, not against forgery: whoever can write into the folder can put a
basis there that is used. A shared folder is as trustworthy as everybody who may write to it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...architectures.modules import matrix_shape
from ...core.basis import FACTS, Basis, truncated_svd
from ...core.ops.native import fingerprint
from ...core.parallel import map_on_threads
from ...core.rank_rule import Rank
from ...core.validation import DeviceLike
from ...errors import OutputError, UnsupportedFormat, output_error
from ...files.hashing import hash_parts
from ...files.state import flush_file
from ...files.store import Store, digest
from ..base import Base, stack_weights
from ..upload import Reader, work_in_turn
from . import basis_file
from .basis_file import StoredBasis
from .cache_folder import trim_cache
from .tables import JsonTable

CACHE_VARIABLE = "PROLORA_CACHE"
# Part of what a basis is made of: raise it when an algorithm's results change, or its file.
VERSION = 5
TOLERANCE = 1e-3  # of bases, `truncated_svd`'s default
_DTYPES = dict.fromkeys(FACTS, torch.float64) | {"rank": torch.int64, "ok": torch.bool}
# Two writes within one tick of a file system's clock leave the same times: a file that was changed
# so shortly before it was hashed (ns) is not put into the index.
SETTLING_TIME = 2_000_000_000
# A use of a basis counts for so long (s), before the file's time is set again.
TOUCH_INTERVAL = 86_400

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Returns the platform's folder for deletable files, or PROLORA_CACHE's."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "prolora"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "prolora" / "cache"
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))  # to be ignored unless it is absolute
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "prolora"


@dataclass(frozen=True)
class BasisRequest:
    """The bases of a stack of weights, as the folder holds them."""

    shape: tuple[int, int]  # of every weight, m × n
    # The basis of each weight, or None; empty without a folder
    stored: Sequence[StoredBasis | None]
    missing: Sequence[int]  # indices of the weights that must be computed
    names: Sequence[str] = ()  # of the bases


def hash_weights(weights: Sequence[Tensor]) -> list[str]:
    """Computes SHA-256 of each weight [m, n] as stored: dtype, shape and bytes."""
    return map_on_threads(lambda w: hash_parts([f"{w.dtype} {list(w.shape)} ", w]), weights)


def name_basis(weight: str, rank: Rank) -> str:
    """Returns the name of a basis, made of a weight's hash, rule, tolerance and version."""
    return digest([weight, repr(rank), TOLERANCE, f"{VERSION}{fingerprint()}"])[:32]


class BasisCache:
    """A folder of bases, or none: then nothing is kept."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        """Opens the folder.

        Raises:
            OutputError: it cannot be made.
        """
        self.folder = None if folder is None else Path(folder)
        self.hits = self.misses = self.kept = 0  # bases found, bases computed, bytes written
        self._notes: dict[str, JsonTable] = {}
        # Of this run alone; the bases are held, so that no other gets their id.
        self._digests: dict[tuple[int, str], tuple[Base, str]] = {}
        self._flushed: set[Path | None] = set()
        self._failed = False
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise output_error(self.folder, error, "the cache folder cannot be made") from error

    def of(
        self, base: Base, modules: Sequence[str], rank: Rank, device: DeviceLike = None
    ) -> Basis:
        """Returns the bases of weights of one matrix shape, stacked [b, m, n]."""
        return next(self.in_turn([partial(self.look_up, base, modules, rank)], rank, device))

    def bases(self, weights: Tensor, rank: Rank) -> Basis:
        """Returns the bases of a stack [b, m, n] in memory without a base model."""
        request = partial(self.look_up_weights, list(weights), rank)
        return next(self.in_turn([request], rank))

    def in_turn(
        self,
        requests: Iterable[Reader[BasisRequest]],
        rank: Rank,
        device: DeviceLike = None,
    ) -> Iterator[Basis]:
        """Yields the bases of several stacks; a GPU reads ahead while it factorises."""
        place = torch.device(device or "cpu")
        return work_in_turn(requests, partial(self._answer, rank, place), place)

    def look_up(
        self, base: Base, modules: Sequence[str], rank: Rank
    ) -> tuple[BasisRequest, list[Tensor]]:
        """Looks bases up in the folder, and reads the weights without one.

        All modules have one matrix shape.
        """
        shape = matrix_shape(base.shapes[modules[0]])

        def read(places: Sequence[int]) -> list[Tensor]:
            return [base.read(modules[i]).reshape(shape) for i in places]

        every = list(range(len(modules)))
        if self.folder is None:
            return BasisRequest(shape, [], every), [stack_weights(read(every))]
        digests = [self.digest(base, module) for module in modules]
        unknown = [i for i, known in enumerate(digests) if known is None]
        tensors = read(unknown)
        for i, known in zip(unknown, hash_weights(tensors), strict=True):
            digests[i] = known
            self.learn(base, modules[i], known)
        request = self._request([name_basis(str(known), rank) for known in digests], shape)
        if request.missing != unknown:
            tensors = read(request.missing)
        return request, [stack_weights(tensors)] if tensors else []

    def look_up_weights(
        self, weights: Sequence[Tensor], rank: Rank
    ) -> tuple[BasisRequest, list[Tensor]]:
        """Looks up the bases of weights [m, n] in memory, of one shape."""
        shape = (weights[0].shape[0], weights[0].shape[1])
        if self.folder is None:
            return BasisRequest(shape, [], list(range(len(weights)))), [stack_weights(weights)]
        request = self._request([name_basis(known, rank) for known in hash_weights(weights)], shape)
        missing = [weights[i] for i in request.missing]
        return request, [stack_weights(missing)] if missing else []

    def _request(self, names: list[str], shape: tuple[int, int]) -> BasisRequest:
        """Looks up the bases of these names in the folder."""
        # In turn: threads that open files, each a moment, wait for each other's Python.
        stored = [self._read(name, shape) for name in names]
        missing = [i for i, basis in enumerate(stored) if basis is None]
        return BasisRequest(shape, stored, missing, names)

    def _answer(
        self, rank: Rank, device: torch.device, request: BasisRequest, weights: list[Tensor]
    ) -> Basis:
        """Returns the stack of the bases; computes and keeps missing ones."""
        if self.folder is None:
            return truncated_svd(weights[0], rank)
        stored, missing = list(request.stored), request.missing
        if missing:
            names = [request.names[i] for i in missing]
            computed = self._compute(rank, names, weights[0])
            for i, basis in zip(missing, computed, strict=True):
                stored[i] = basis
        return self._stacked(stored, missing, request.shape, device)

    def digest(self, base: Base, module: str) -> str | None:
        """Returns the content hash of a weight, if known without reading.

        Without a folder it need not outlive this run, and is a name that takes no reading.
        """
        if self.folder is None:
            self._digests[id(base), ""] = (base, "")  # holds the base, so that no other has its id
            return f"{id(base)} {module}"
        if (id(base), module) in self._digests:
            return self._digests[id(base), module][1]
        origin = base.weights[module].origin
        if origin is None:
            return None
        known = self._index(base).get(_shorten(origin.text))
        return known if isinstance(known, str) else None

    def place(self, base: Base, module: str) -> str | None:
        """Returns a weight's name by the state of its file, without reading.

        None where that is not settled: the file changed just now, or the weight is in no file.
        """
        if self.folder is None:
            return self.digest(base, module)
        self._flush(base)
        origin = base.weights[module].origin
        settled = origin and time.time_ns() - origin.changed > SETTLING_TIME
        return _shorten(origin.text) if origin and settled else None

    def names(self, base: Base, modules: Sequence[str], rank: Rank) -> list[str]:
        """Returns the names of bases that were taken from here in this run."""
        return [name_basis(str(self.digest(base, module)), rank) for module in modules]

    def learn(self, base: Base, module: str, known: str) -> None:
        """Remembers the content hash of a weight that was read just now."""
        if self.folder is None:
            return
        self._digests[id(base), module] = (base, known)
        origin = base.weights[module].origin
        if origin and time.time_ns() - origin.changed > SETTLING_TIME:
            self._index(base).put(_shorten(origin.text), known)

    def pairs(self, source: Base, target: Base) -> JsonTable:
        """Returns the table of what is known of weight pairs of two bases."""
        return self._table("pairs", f"{source.path or source.name} {target.path or target.name}")

    @contextmanager
    def saving(self) -> Iterator[BasisCache]:
        """Saves what was learnt in the body, even if that fails."""
        try:
            yield self
        finally:
            self.save()

    def save(self) -> None:
        """Writes the index and the tables; what is beyond the size of the cache goes."""
        for notes in self._notes.values():
            if notes.changed:
                self._try(notes.save)
        if self.kept and self.folder is not None:
            trim_cache(self.folder)

    def _index(self, base: Base) -> JsonTable:
        """Returns the table of contents of a base's weights, before any is read."""
        self._flush(base)
        return self._table("index", str(base.path))

    def _flush(self, base: Base) -> None:
        """Makes changes of a base's files set their times, once."""
        if base.path not in self._flushed:
            for file in base.files:
                flush_file(file)
            self._flushed.add(base.path)

    def _table(self, kind: str, of: str) -> JsonTable:
        name = f"{kind} {of}"
        if name not in self._notes:
            path = self.folder and Store(self.folder).path(
                "tables", [name, VERSION], suffix=".json"
            )
            self._notes[name] = JsonTable(path)
        return self._notes[name]

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / "bases" / f"{name}.safetensors"

    def _read(self, name: str, shape: tuple[int, int]) -> StoredBasis | None:
        """Reads the basis of that name; None if missing or damaged."""
        path = self._path(name)
        try:
            stored = basis_file.read_basis(path)
            if stored.facts.get("name") != name or stored.shape != shape:
                raise UnsupportedFormat("it is of another weight")
            if time.time() - path.stat().st_mtime > TOUCH_INTERVAL:
                os.utime(path)
        except FileNotFoundError:
            return None
        except (UnsupportedFormat, OSError) as error:
            log.warning("%s is not used and will be made again: %s", path, error)
            return None
        return stored

    def _compute(self, rank: Rank, names: Sequence[str], weights: Tensor) -> list[StoredBasis]:
        """Computes and keeps the bases of a stack [c, m, n]."""
        computed = truncated_svd(weights, rank, tol=TOLERANCE).to("cpu")
        bases = []
        for i, name in enumerate(names):
            stored = basis_file.make_stored_basis(computed[i], name)
            self._try(partial(self._write, self._path(name), stored))
            bases.append(stored)
        return bases

    def _write(self, path: Path, stored: StoredBasis) -> None:
        basis_file.write_basis(path, stored)
        self.kept += path.stat().st_size

    def _try(self, write: Any) -> None:
        """Writes; a full or read-only disk costs only the time to come, and is tried once."""
        if self._failed or self.folder is None:
            return
        try:
            write()
        except (OutputError, OSError) as error:
            self._failed = True
            log.warning("%s: bases are not kept: %s", self.folder, error)

    def _stacked(
        self,
        stored: list[StoredBasis | None],
        missing: Sequence[int],
        shape: tuple[int, int],
        device: torch.device,
    ) -> Basis:
        """Stacks single bases."""
        self.misses += len(missing)
        self.hits += len(stored) - len(missing)
        parts = [basis for basis in stored if basis is not None]
        width, dtype = max(basis.columns for basis in parts), parts[0].tensors["S"].dtype
        factors = {
            "U": torch.zeros(len(parts), shape[0], width, dtype=dtype),
            "S": torch.zeros(len(parts), width, dtype=dtype),
            "V": torch.zeros(len(parts), shape[1], width, dtype=dtype),
        }
        for i, basis in enumerate(parts):
            for name, factor in factors.items():
                factor[i][..., : basis.columns] = basis.tensors[name]
        facts = {
            part: torch.tensor([basis.facts[part] for basis in parts], dtype=_DTYPES[part])
            for part in FACTS
        }
        rungs = tuple(str(basis.facts["rung"]) for basis in parts)
        stack = Basis(**factors, **facts, rungs=rungs)
        return stack.to(device)


CacheLike = str | os.PathLike[str] | BasisCache | None
"""A folder that keeps subspaces, a cache that is open, or None: nothing is kept."""


@contextmanager
def open_cache(cache: CacheLike) -> Iterator[BasisCache]:
    """Yields the cache, saved at the end unless it was open before.

    Raises:
        OutputError: the folder cannot be made.
    """
    if isinstance(cache, BasisCache):
        yield cache
    else:
        with BasisCache(cache).saving() as opened:
            yield opened


def _shorten(text: str) -> str:
    return digest(text)[:32]
