"""Parts of an interrupted fit, named by what they were made of."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bases.pipeline_identity import describe_versions, digest_facts
from ..core.lowrank import LowRank
from ..errors import OutputError, UnsupportedFormat
from ..files.hashing import hash_tensors, hash_text
from ..files.safetensors_file import SafetensorsFile
from ..files.safetensors_writing import write_safetensors
from ..version import __version__

log = logging.getLogger(__name__)

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


class KeptParts:
    """Named tensors in a folder, under hashes of their inputs.

    One whose checksum does not match is computed again.
    """

    def __init__(
        self,
        folder: str | PathLike[str] | None = None,
        inputs: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Takes a folder, made with the first part; None keeps nothing.

        `inputs` digests all that parts depend on beside versions.
        """
        self.folder = None if folder is None else Path(folder)
        self._digest = ""
        if folder is not None:
            self._digest = digest_facts({"versions": describe_versions(), **(inputs or dict)()})

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

    def remove_own_parts(self) -> None:
        """Deletes what serves no other LoRA."""
        for path in self.folder.glob("*.safetensors") if self.folder else ():
            if path.name.startswith(_OF_ONE_LORA):
                path.unlink(missing_ok=True)

    def _path(self, name: str, key: str) -> Path | None:
        if self.folder is None:
            return None
        path = self.folder / f"{name}-{hash_texts(key, self._digest)[:16]}.safetensors"
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise OutputError(f"{path}: is a link or no file, and no result of prolora; remove it")
        return path


def _sum(path: Path, tensors: Mapping[str, Tensor], note: str) -> str:
    return hash_texts(path.name, hash_tensors(tensors, tensors.__getitem__), note)
