"""Parts of an interrupted fit, named by what they were made of."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bases import Base
from ..bases.cache.basis_cache import default_folder
from ..bases.pipeline_files import is_pipeline
from ..bases.pipeline_identity import describe_pipeline_folder, describe_versions, digest_facts
from ..core.lowrank import LowRank
from ..errors import OutputError, UnsupportedFormat
from ..files.hashing import hash_tensors, hash_text
from ..files.safetensors_file import SafetensorsFile
from ..files.safetensors_writing import write_safetensors
from ..files.state import FileState, read_state
from ..version import __version__

log = logging.getLogger(__name__)

PARTS = ".prolora-parts"
"""The folder of parts that were not asked for, beside the results until all are made."""
_OF_ONE_LORA = ("images-adapted-", "fit-")
"""What the names of parts begin with that serve no other LoRA."""
_SUM, _NOTE = "prolora.fitting.sum", "prolora.fitting.note"


def hash_texts(*parts: str) -> str:
    """Computes SHA-256 of texts, in hexadecimal."""
    return hash_text(json.dumps([__version__, *parts]))


def hash_updates(updates: Mapping[str, LowRank]) -> str:
    """Computes SHA-256 of updates by module."""
    factors = _name_factors(updates)
    return hash_tensors(factors, factors.__getitem__)


def _name_factors(updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
    factors = {f"{name}.up": u.up for name, u in updates.items()}
    return factors | {f"{name}.down": u.down for name, u in updates.items()}


def watch_pipelines(source: Base, target: Base) -> Callable[[], dict[str, str]] | None:
    """Returns what digests two pipelines after their use; None where one is no pipeline.

    A digest is "" where a file has changed meanwhile.
    """
    sides = {"source": source.path, "target": target.path}
    folders = {side: path for side, path in sides.items() if path and is_pipeline(path)}
    if len(folders) < len(sides):
        return None
    before = _read_states(folders)

    def digest() -> dict[str, str]:
        known = default_folder()  # remembers digests, where there is a cache at all
        memory = known if known.is_dir() else None
        facts = {side: describe_pipeline_folder(x, memory) for side, x in folders.items()}
        same = _read_states(folders) == before
        return {side: digest_facts(x) if same else "" for side, x in facts.items()}

    return digest


def _read_states(folders: Mapping[str, Path]) -> dict[Path, FileState]:
    files = (file for folder in folders.values() for file in folder.rglob("*"))
    return {file: read_state(file) for file in files if file.is_file()}


class KeptParts:
    """Named tensors in a folder, under hashes of their inputs.

    One whose checksum does not match is computed again.
    """

    def __init__(self, folder: str | PathLike[str] | None = None, is_temporary: bool = False):
        """Takes a folder, made with the first part; None keeps nothing.

        `is_temporary` says that it was not asked for, and is removed once all fits are made.
        """
        self.folder = None if folder is None else Path(folder)
        self.is_temporary = is_temporary
        self._digest = ""

    @classmethod
    @contextmanager
    def share(
        cls, resume: str | PathLike[str] | None, folder: Path, several: bool
    ) -> Iterator[KeptParts]:
        """Yields the parts of several fits into a folder, while they go on."""
        if resume is not None or not several:
            yield cls(resume)
            return
        parts = folder / PARTS  # what a killed run has left there goes on
        try:
            yield cls(parts, is_temporary=True)
        finally:
            shutil.rmtree(parts, ignore_errors=True)

    def of_pipelines(self, source: Base, target: Base) -> None:
        """Makes parts depend on all files of two pipelines, which are digested once."""
        watched = watch_pipelines(source, target)
        if self.folder is not None and not self._digest and watched is not None:
            self._digest = digest_facts({"versions": describe_versions(), **watched()})

    def recall(self, name: str, key: str) -> tuple[dict[str, Tensor], str] | None:
        """Returns the tensors and the note under a name and key, if any."""
        path = self._path(name, key)
        if path is None or not path.exists():
            return None
        try:
            file = SafetensorsFile(path)
            tensors = {name: file.read(name) for name in file.tensors}
            note = file.metadata.get(_NOTE, "")
            if file.metadata.get(_SUM) != _sum(path, tensors, note):
                raise UnsupportedFormat("its checksum is another")
        except UnsupportedFormat as error:
            log.warning("%s is damaged; it is computed again: %s", path, error)
            return None
        return tensors, note

    def store(self, name: str, key: str, tensors: Mapping[str, Tensor], note: str = "") -> None:
        """Stores tensors and a note."""
        path = self._path(name, key)
        if path is not None:
            marks = {_SUM: _sum(path, tensors, note), _NOTE: note}
            write_safetensors(path, dict(tensors), marks, overwrite=True)

    def recall_updates(
        self, name: str, key: str
    ) -> tuple[dict[str, LowRank], dict[str, Any]] | None:
        """Returns updates by module, and facts; None where there are none."""
        stored = self.recall(name, key)
        if stored is None:
            return None
        tensors, note = stored
        names = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
        updates = {n: LowRank(tensors[f"{n}.up"], tensors[f"{n}.down"]) for n in names}
        return updates, json.loads(note)

    def store_updates(
        self, name: str, key: str, updates: Mapping[str, LowRank], facts: Mapping[str, Any]
    ) -> None:
        """Stores updates by module, and facts that JSON can hold."""
        self.store(name, key, _name_factors(updates), json.dumps(facts))

    def end_lora(self) -> None:
        """Deletes from a temporary folder what serves no other LoRA."""
        for path in self.folder.glob("*.safetensors") if self.folder and self.is_temporary else ():
            if path.name.startswith(_OF_ONE_LORA):
                path.unlink(missing_ok=True)

    def _path(self, name: str, key: str) -> Path | None:
        if self.folder is None:
            return None
        digest = self._digest or digest_facts({"versions": describe_versions()})
        path = self.folder / f"{name}-{hash_texts(key, digest)[:16]}.safetensors"
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise OutputError(f"{path}: is a link or no file, and no result of prolora; remove it")
        return path


def _sum(path: Path, tensors: Mapping[str, Tensor], note: str) -> str:
    return hash_texts(path.name, hash_tensors(tensors, tensors.__getitem__), note)
