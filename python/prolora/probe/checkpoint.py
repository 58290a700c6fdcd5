"""Results of an interrupted probing in a folder, used again only where they match."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.lowrank import LowRank
from ..errors import OutputError, UnsupportedFormat
from ..files.hashing import hash_parts, hash_text
from ..files.safetensors_file import SafetensorsFile
from ..files.writing import write_safetensors
from ..version import __version__

log = logging.getLogger(__name__)

SECONDS_BETWEEN_STATES = 180.0
"""Seconds between two states of a fit: writing that of a large model takes about ten seconds."""

_KEY, _SUM, _NOTE = "prolora.probe.key", "prolora.probe.sum", "prolora.probe.note"


def hash_texts(*parts: str) -> str:
    """SHA-256 of texts, in hexadecimal."""
    return hash_text(json.dumps([__version__, *parts]))


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, their names, shapes and dtypes."""
    return hash_parts(
        part
        for name, tensor in sorted(tensors.items())
        for part in (f"{name} {tensor.dtype} {tuple(tensor.shape)} ", tensor)
    )


def hash_model(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers."""
    return hash_tensors(dict(model.named_parameters()) | dict(model.named_buffers()))


def hash_updates(updates: Mapping[str, LowRank]) -> str:
    """SHA-256 of updates."""
    return hash_tensors(_name_factors(updates))


def _name_factors(updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
    factors = {f"{name}.up": u.up for name, u in updates.items()}
    return factors | {f"{name}.down": u.down for name, u in updates.items()}


class Checkpoints:
    """Named results in a folder, each under a key, the hash of what it depends on.

    A result is used again only if its key and the checksum of its content match; anything else is
    computed again.
    """

    def __init__(self, folder: str | PathLike[str] | None) -> None:
        """Opens a folder, created if it does not exist; None keeps nothing.

        Raises:
            OutputError: the folder cannot be created.
        """
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{folder}: cannot be created: {error}") from error

    def recall(self, name: str, key: str) -> tuple[dict[str, Tensor], str] | None:
        """The tensors and the note under a name and key; None where there are none."""
        path = self._path(name, key)
        if path is None or not path.exists():
            return None
        try:
            file = SafetensorsFile(path)
            tensors = {name: file.read(name) for name in file.tensors}
            note = file.metadata.get(_NOTE, "")
            marks = file.metadata.get(_KEY), file.metadata.get(_SUM)
        except UnsupportedFormat as error:
            log.warning("%s is damaged; it is computed again: %s", path, error)
            return None
        if marks != (key, hash_texts(hash_tensors(tensors), note)):
            log.warning("%s is damaged or belongs to other inputs; it is computed again", path)
            return None
        return tensors, note

    def store(self, name: str, key: str, tensors: Mapping[str, Tensor], note: str = "") -> None:
        """Stores tensors and a note.

        Raises:
            OutputError: the file cannot be written.
        """
        path = self._path(name, key)
        if path is not None:
            marks = {_KEY: key, _SUM: hash_texts(hash_tensors(tensors), note), _NOTE: note}
            write_safetensors(path, dict(tensors), marks)

    def remove(self, name: str, key: str) -> None:
        """Deletes what is stored under a name and key."""
        path = self._path(name, key)
        if path is not None:
            path.unlink(missing_ok=True)

    def _path(self, name: str, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}-{key[:16]}.safetensors"

    def recall_updates(
        self, name: str, key: str
    ) -> tuple[dict[str, LowRank], dict[str, Any]] | None:
        """Updates by module, and facts; None where there are none."""
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
        if self.folder is not None:
            self.store(name, key, _name_factors(updates), json.dumps(facts))

    def state_file(self, name: str, key: str) -> StateFile | None:
        """Where the state of a long fit is kept; None without a folder."""
        return None if self.folder is None else StateFile(self, name, key)


class StateFile:
    """The state of a long fit, stored every few minutes in one file."""

    def __init__(self, checkpoints: Checkpoints, name: str, key: str) -> None:
        """Takes the folder, and the name and key in it."""
        self.checkpoints, self.name, self.key = checkpoints, name, key
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether SECONDS_BETWEEN_STATES have passed."""
        return time.monotonic() - self.last >= SECONDS_BETWEEN_STATES

    def store(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replaces the stored state."""
        self.checkpoints.store(self.name, self.key, tensors, json.dumps(facts))
        self.last = time.monotonic()

    def recall(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that was stored last."""
        stored = self.checkpoints.recall(self.name, self.key)
        return None if stored is None else (stored[0], json.loads(stored[1]))

    def remove(self) -> None:
        """Deletes the state: the fit is finished."""
        self.checkpoints.remove(self.name, self.key)
