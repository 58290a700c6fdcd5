"""What an interrupted probing has done so far, in a folder, and trusted only where it matches."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.lowrank import LowRank
from ..errors import OutputError, UnsupportedFormat
from ..files.hashing import hash_parts, hash_text
from ..files.safetensors_file import SafetensorsFile
from ..files.writing import write_safetensors
from ..version import __version__
from . import call_codec
from .trajectories import Call

log = logging.getLogger(__name__)

SECONDS_BETWEEN_STATES = 180.0
"""Seconds between two states of a fit: writing one of a large model takes some ten of them."""

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


def hash_updates(found: Mapping[str, LowRank]) -> str:
    """SHA-256 of updates."""
    parts = {f"{name}.up": u.up for name, u in found.items()}
    return hash_tensors(parts | {f"{name}.down": u.down for name, u in found.items()})


class Checkpoints:
    """Named results in a folder, each under a key that says what it depends on.

    A result is taken back only if its key is the one asked for and its content has the checksum
    that was written with it; anything else is made again.
    """

    def __init__(self, folder: str | PathLike[str] | None) -> None:
        """In a folder, made if it does not exist; None keeps nothing.

        Raises:
            OutputError: the folder cannot be made.
        """
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{folder}: cannot be made: {error}") from error

    def recall(self, name: str, key: str) -> tuple[dict[str, Tensor], str] | None:
        """The tensors and the note kept under a name and key; None where there are none."""
        path = self._path(name, key)
        if path is None or not path.exists():
            return None
        try:
            file = SafetensorsFile(path)
            found = {name: file.read(name) for name in file.tensors}
            note = file.metadata.get(_NOTE, "")
            told = file.metadata.get(_KEY), file.metadata.get(_SUM)
        except UnsupportedFormat as error:
            log.warning("%s is damaged and made again: %s", path, error)
            return None
        if told != (key, hash_texts(hash_tensors(found), note)):
            log.warning("%s is damaged or foreign and made again", path)
            return None
        return found, note

    def store(self, name: str, key: str, tensors: Mapping[str, Tensor], note: str = "") -> None:
        """Keeps tensors and a note.

        Raises:
            OutputError: the file cannot be written.
        """
        path = self._path(name, key)
        if path is not None:
            marks = {_KEY: key, _SUM: hash_texts(hash_tensors(tensors), note), _NOTE: note}
            write_safetensors(path, dict(tensors), marks)

    def remove(self, name: str, key: str) -> None:
        """Forgets what is kept under a name and key."""
        path = self._path(name, key)
        if path is not None:
            path.unlink(missing_ok=True)

    def _path(self, name: str, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}-{key[:16]}.safetensors"

    def calls(
        self, name: str, key: str, device: torch.device, make: Callable[[], list[Call]]
    ) -> list[Call]:
        """Recorded calls: those kept, or those that `make` records, which are kept then."""
        found = self.recall(name, key)
        if found is not None:
            tensors, note = found
            ordered = [tensors[str(i)].to(device) for i in range(len(tensors))]
            return call_codec.decode_calls(ordered, note)
        calls = make()
        if self.folder is not None:
            several, text = call_codec.encode_calls(calls)
            self.store(name, key, {str(i): t for i, t in enumerate(several)}, text)
        return calls

    def fitted(self, name: str, key: str) -> tuple[dict[str, LowRank], dict[str, Any]] | None:
        """Updates by module, and facts; None where there are none."""
        found = self.recall(name, key)
        if found is None:
            return None
        tensors, note = found
        names = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
        updates = {n: LowRank(tensors[f"{n}.up"], tensors[f"{n}.down"]) for n in names}
        return updates, json.loads(note)

    def halfway(self, name: str, key: str) -> StateFile | None:
        """Where the state of a long fit is kept; None where nothing is."""
        return None if self.folder is None else StateFile(self, name, key)

    def keep_fitted(
        self, name: str, key: str, found: Mapping[str, LowRank], facts: Mapping[str, Any]
    ) -> None:
        """Keeps updates and facts."""
        if self.folder is not None:
            parts = {f"{name}.up": u.up for name, u in found.items()}
            parts |= {f"{name}.down": u.down for name, u in found.items()}
            self.store(name, key, parts, json.dumps(facts))


class StateFile:
    """The state of a fit that takes long, kept every few minutes in one file."""

    def __init__(self, keep: Checkpoints, name: str, key: str) -> None:
        """In a folder, under a name and key."""
        self.keep, self.name, self.key = keep, name, key
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether EVERY seconds have gone by."""
        return time.monotonic() - self.last >= SECONDS_BETWEEN_STATES

    def store(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keeps a state instead of the one before."""
        self.keep.store(self.name, self.key, tensors, json.dumps(facts))
        self.last = time.monotonic()

    def recall(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that was kept last."""
        found = self.keep.recall(self.name, self.key)
        return None if found is None else (found[0], json.loads(found[1]))

    def drop(self) -> None:
        """Forgets it: the fit is done."""
        self.keep.remove(self.name, self.key)
