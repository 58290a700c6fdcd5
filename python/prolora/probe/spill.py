"""Tensors that are needed later: in memory up to a bound, in temporary files beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files.safetensors_file import SafetensorsFile
from ..files.writing import dump_safetensors
from . import call_codec
from .lazy import LazySequence
from .trajectories import Call

Bundle = tuple[Tensor, ...]


class SpillStore:
    """Bundles of tensors under keys, each put once and taken once or more.

    All of it lies in the machine's memory, not in a GPU's; what is put while the bound is reached
    goes to a file. It comes back bit for bit, on the device it was on. Files lie in a temporary
    folder that goes away with the shelf.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """With at most so many bytes in memory; None: all of it."""
        self.max_bytes = max_bytes
        self.held = self.spilled = 0
        self._bundles: dict[Hashable, tuple[Bundle, torch.device]] = {}
        self._files: dict[Hashable, tuple[Path, torch.device]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, key: Hashable, bundle: Bundle) -> None:
        """Keeps tensors of one device; the key must be new."""
        size = sum(t.numel() * t.element_size() for t in bundle)
        device = bundle[0].device if bundle else torch.device("cpu")
        if self.max_bytes is None or self.held + size <= self.max_bytes or not size:
            self._bundles[key] = tuple(t.cpu() for t in bundle), device
            self.held += size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="prolora-probe-")
        path = Path(self._folder.name) / f"{len(self._files)}-{self.spilled}.safetensors"
        named = {str(i): t.detach().cpu().contiguous() for i, t in enumerate(bundle)}
        dump_safetensors(path, named, {})
        self._files[key] = path, device
        self.spilled += size

    def get(self, key: Hashable) -> Bundle:
        """The tensors under a key."""
        if key in self._bundles:
            bundle, device = self._bundles[key]
            return tuple(t.to(device) for t in bundle)
        path, device = self._files[key]
        file = SafetensorsFile(path)
        return tuple(file.read(str(i)).to(device) for i in range(len(file.tensors)))

    def take(self, key: Hashable) -> Bundle:
        """The tensors under a key, which is then free and takes no more memory or disk."""
        found = self.get(key)
        if key in self._bundles:
            bundle, _ = self._bundles.pop(key)
            self.held -= sum(t.numel() * t.element_size() for t in bundle)
        else:
            self._files.pop(key)[0].unlink()
        return found

    def __contains__(self, key: Hashable) -> bool:
        """Whether something is kept under a key."""
        return key in self._bundles or key in self._files


class SpilledRows(LazySequence[Bundle]):
    """The bundles under (i, name) for i = 0, 1, …, each read when it is asked for."""

    def __init__(self, shelf: SpillStore, name: str, size: int) -> None:
        """Of a shelf."""
        self.shelf, self.name, self.size = shelf, name, size

    def __len__(self) -> int:
        """How many."""
        return self.size

    def item(self, i: int) -> Bundle:
        """Bundle i."""
        return self.shelf.get((i, self.name))

    def drop(self) -> None:
        """Frees what they take."""
        for i in range(self.size):
            self.shelf.take((i, self.name))


def spill_calls(calls: Iterable[Call], shelf: SpillStore, name: str) -> Sequence[Call]:
    """Calls one after the other onto a shelf; a plain list where it has no bound."""
    if shelf.max_bytes is None:
        return list(calls)
    found = SpilledCalls(shelf, name)
    for call in calls:
        found.append(call)
    return found


class SpilledCalls(LazySequence[Call]):
    """Calls that lie on a shelf."""

    def __init__(self, shelf: SpillStore, name: str) -> None:
        """Empty; `name` must be nobody else's on the shelf."""
        self.shelf, self.name = shelf, name
        self.texts: list[str] = []

    def append(self, call: Call) -> None:
        """Puts one on the shelf."""
        tensors, text = call_codec.encode_calls([call])
        self.shelf.put((len(self.texts), self.name), tuple(tensors))
        self.texts.append(text)

    def __len__(self) -> int:
        """How many."""
        return len(self.texts)

    def item(self, i: int) -> Call:
        """Call i."""
        return call_codec.decode_calls(self.shelf.get((i, self.name)), self.texts[i])[0]

    def drop(self) -> None:
        """Frees what they take."""
        for i in range(len(self.texts)):
            self.shelf.take((i, self.name))
        self.texts = []
