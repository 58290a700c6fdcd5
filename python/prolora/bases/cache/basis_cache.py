"""Subspaces kept on disk: they belong to a base model alone, so the second LoRA finds them there.

A file for each weight, named by the digest of the weight's bytes and what was asked: it serves
everybody who has that weight, in whatever file. A basis that is damaged, foreign or of another
version is recomputed and never trusted. Beside the bases lie the few numbers that a transfer wants
to know of pairs of weights, and the digests of tensors by the state of their files.

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
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...architectures.modules import matrix_shape
from ...core.basis import Basis, read_weight, stack_bases, truncated_svd
from ...core.ops.native import fingerprint
from ...core.ops.trial import keep_choices
from ...core.projectors import AnyBasis, Projectors, find_projectors, join_projectors
from ...core.rank_rule import Rank
from ...core.validation import DeviceLike
from ...errors import OutputError, UnsupportedFormat, output_error
from ...files.store import Store, digest
from ..base import Base, stack_weights
from ..upload import Reader, work_in_turn
from . import basis_file
from .cache_folder import trim_cache
from .tables import JsonTable

CACHE_VARIABLE = "PROLORA_CACHE"
# Part of what a basis is made of: raise it when an algorithm's results change, or its file.
VERSION = 8
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


Request: TypeAlias = tuple[list[AnyBasis | None], list[str | None], bool]
"""The basis of each weight of a stack, None if it must be computed, and its name, None if it is not
kept; whether projectors are wanted."""


class BasisCache:
    """A folder of bases, or none: then nothing is kept."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        """Opens the folder.

        Raises:
            OutputError: it cannot be made.
        """
        self.folder = None if folder is None else Path(folder)
        self.kept = 0  # bytes written
        self._written: list[Path] = []
        self._tables: dict[str, JsonTable] = {}
        self._held: list[Base] = []  # so that no other gets the id of one
        self._failed = False
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise output_error(self.folder, error, "the cache folder cannot be made") from error
        self._tables["kernels"] = choices = JsonTable(self.folder / "kernels.json")
        keep_choices(choices.get, choices.put)

    def of(
        self, base: Base, modules: Sequence[str], rank: Rank, device: DeviceLike = None
    ) -> Basis:
        """Returns the bases of weights of one matrix shape, stacked [b, m, n]."""
        request = partial(self.look_up, base, modules, rank)
        basis = next(self.prefetch([request], rank, device))
        assert isinstance(basis, Basis)
        return basis

    def prefetch(
        self,
        requests: Iterable[Reader[Request]],
        rank: Rank,
        device: DeviceLike = None,
    ) -> Iterator[AnyBasis]:
        """Yields what several requests ask for; a GPU reads ahead while it factorises."""
        place = torch.device(device or "cpu")
        return work_in_turn(requests, partial(self._answer, rank, place), place)

    def look_up(
        self, base: Base, modules: Sequence[str], rank: Rank, projectors: bool = False
    ) -> tuple[Request, list[Tensor]]:
        """Looks bases up in the folder, and reads the weights without one.

        All modules have one matrix shape. `projectors`: whether these are wanted, which take less
        time and room than bases; on a CPU only.
        """
        shape = matrix_shape(base.shapes[modules[0]])
        # What is not known by its digest is read for it, once.
        unknown = [module for module in modules if self.place(base, module) is None]
        tensors = {module: base.read(module) for module in unknown}
        names = self.names(base, modules, rank)
        if projectors:
            names = [name and f"{name}p" for name in names]
        # In turn: threads that open files, each a moment, wait for each other's Python.
        stored = [self._read(name, shape) if self.folder else None for name in names]
        missing = [one for one, basis in zip(modules, stored, strict=True) if basis is None]
        read = (tensors[one] if one in tensors else base.read(one) for one in missing)
        stack = [tensor.reshape(shape) for tensor in read]
        return (stored, names, projectors), [stack_weights(stack)] if stack else []

    def _answer(
        self, rank: Rank, device: torch.device, request: Request, weights: list[Tensor]
    ) -> AnyBasis:
        """Returns the stack of the bases; computes and keeps missing ones."""
        bases, names, projectors = request
        if self.folder is None:
            return _compute(weights[0], rank, projectors)
        missing = [i for i, basis in enumerate(bases) if basis is None]
        if missing:
            computed = _compute(weights[0], rank, projectors).to("cpu")
            for position, i in enumerate(missing):
                bases[i] = basis = computed[position]
                if (name := names[i]) is not None:
                    self._try(partial(self._write, basis, name))
        if projectors:
            return join_projectors([x for x in bases if isinstance(x, Projectors)])
        return stack_bases([x for x in bases if isinstance(x, Basis)]).to(device)

    def place(self, base: Base, module: str, *, learn: bool = False) -> str | None:
        """Returns a weight's name by its content; None where that is not known.

        `learn` reads what is not known; a weight in no file has no name. Without a folder a name
        need not outlive this run.
        """
        weight = base.weights[module]
        for part in weight.parts:
            part.leaves.note(part.key)
        if all(other is not base for other in self._held):
            self._held.append(base)
            for leaves in base.leaves if self.folder is not None else ():
                leaves.remember(self.folder)
        if self.folder is None:
            return f"{id(base)} {module}"
        has_digests = learn or all(part.leaves.recall(part.key) for part in weight.parts)
        return digest(weight.content)[:32] if weight.parts and has_digests else None

    def names(self, base: Base, modules: Sequence[str], rank: Rank) -> list[str | None]:
        """Returns the names of bases, made of content, rule, version and kernels."""
        places = [self.place(base, module, learn=True) for module in modules]
        asked = repr(rank), f"{VERSION}{fingerprint()}"
        return [place and digest([place, *asked])[:32] for place in places]

    def pairs(self, source: Base, target: Base) -> JsonTable:
        """Returns the table of what is known of weight pairs of two bases."""
        name = f"pairs {source.path or source.name} {target.path or target.name}"
        if name not in self._tables:
            path = self.folder and Store(self.folder).path(
                "tables", [name, VERSION], suffix=".json"
            )
            self._tables[name] = JsonTable(path)
        return self._tables[name]

    @contextmanager
    def flush_at_end(self) -> Iterator[BasisCache]:
        """Saves what was learnt in the body, even if that fails."""
        try:
            yield self
        finally:
            self.save()

    def save(self) -> None:
        """Writes the tables; what is beyond the size of the cache goes."""
        for leaves in {one for base in self._held for one in base.leaves}:
            leaves.save()
        for table in self._tables.values():
            if table.changed:
                self._try(table.save)
        if self.kept and self.folder is not None:
            trim_cache(self.folder)

    def make_room(self) -> bool:
        """Removes the bases that were written here, for a result that the disk has no room for.

        No more are kept. Returns whether anything was removed.
        """
        self._failed, written = True, self._written
        self._written, self.kept = [], 0
        for path in written:
            path.unlink(missing_ok=True)
        return bool(written)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / "bases" / f"{name}.safetensors"

    def _read(self, name: str | None, shape: tuple[int, int]) -> AnyBasis | None:
        """Reads the basis of that name; None if missing or damaged."""
        if name is None:
            return None
        path = self._path(name)
        try:
            basis, stored_name = basis_file.read_basis(path)
            if stored_name != name or tuple(basis.shape[-2:]) != shape:
                raise UnsupportedFormat("it is of another weight")
            if time.time() - path.stat().st_mtime > TOUCH_INTERVAL:
                os.utime(path)
        except FileNotFoundError:
            return None
        except (UnsupportedFormat, OSError) as error:
            log.warning("%s is not used and will be made again: %s", path, error)
            return None
        return basis

    def _write(self, basis: AnyBasis, name: str) -> None:
        path = self._path(name)
        basis_file.write_basis(path, basis, name)
        self._written.append(path)
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


def _compute(weights: Tensor, rank: Rank, projectors: bool) -> AnyBasis:
    if not projectors:
        return truncated_svd(weights, rank)
    return find_projectors([read_weight(weights, "W")], rank)[0]


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
        with BasisCache(cache).flush_at_end() as opened:
            yield opened
