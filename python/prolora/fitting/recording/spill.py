"""Tensors that are needed later: in memory up to a bound, in temporary files beyond it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import output_error
from ...files.hashing import hash_parts
from ...files.safetensors_file import SafetensorsFile
from ...files.safetensors_writing import dump_safetensors
from ...files.sizes import format_size
from .trajectories import decode_calls, encode_calls
from .translation import Question

Bundle = tuple[Tensor, ...]
"""Tensors of one device that are stored together."""

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """A sequence whose items are computed, or read from files, on access."""

    def __init__(self, count: int, item: Callable[[int], T]) -> None:
        """Takes the length, and a function of 0 ≤ i < count."""
        self._count, self._item = count, item

    def __len__(self) -> int:
        """Returns the number of items."""
        return self._count

    def __getitem__(self, i: Any) -> Any:
        """Computes item i."""
        if not 0 <= i < self._count:
            raise IndexError(i)
        return self._item(i)


class SpillStore:
    """Bundles of tensors by key.

    The bundles are in the machine's memory, not in a GPU's, and equal tensors there once (the text
    embeddings of all steps of an image); a bundle that would exceed the bound goes to a file.
    Bundles come back bit for bit, on their former device. The files are in a
    temporary folder that is deleted with the store.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """Starts empty; `max_bytes` bounds the bytes in memory, None means no bound."""
        self.max_bytes = max_bytes
        self.held = self.spilled = 0
        self._known: dict[str, Tensor] = {}
        self._bundles: dict[Hashable, tuple[Bundle, torch.device]] = {}
        self._files: dict[Hashable, tuple[Path, torch.device]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, key: Hashable, bundle: Bundle) -> None:
        """Stores tensors of one device; the key must be new."""
        device = bundle[0].device if bundle else torch.device("cpu")
        bundle = tuple(t.detach().cpu() for t in bundle)
        names = [hash_parts([f"{t.dtype} {tuple(t.shape)} ", t]) for t in bundle]
        new = {n: t for n, t in zip(names, bundle, strict=True) if n not in self._known}
        size = sum(tensor.nbytes for tensor in new.values())
        if self.max_bytes is None or self.held + size <= self.max_bytes or not size:
            self._known |= new
            self._bundles[key] = tuple(self._known[name] for name in names), device
            self.held += size
            return
        size = sum(tensor.nbytes for tensor in bundle)  # a file holds all of its own
        named = {str(i): t.contiguous() for i, t in enumerate(bundle)}
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="prolora-probe-")
            path = Path(self._folder.name) / f"{len(self._files)}-{self.spilled}.safetensors"
            dump_safetensors(path, named, {})
        except OSError as error:
            place = os.environ.get("TMPDIR") or "the folder for temporary files"
            raise output_error(
                place, error, f"cannot take {format_size(size)} of what does not fit in memory"
            ) from error
        self._files[key] = path, device
        self.spilled += size

    def get(self, key: Hashable) -> Bundle:
        """Loads the tensors under a key."""
        if key in self._bundles:
            bundle, device = self._bundles[key]
            return tuple(t.to(device) for t in bundle)
        path, device = self._files[key]
        file = SafetensorsFile(path)
        return tuple(file.read(str(i)).to(device) for i in range(len(file.tensors)))


def spill_questions(questions: Sequence[Question], limit: int | None) -> Sequence[Question]:
    """Moves questions to the machine's memory, and beyond `limit` bytes to files.

    Without a limit, questions that are in the machine's memory already stay as they are.
    """
    tensors = encode_calls([questions[0].source])[0] if questions else []
    if limit is None and all(tensor.device.type == "cpu" for tensor in tensors):
        return questions
    store, texts = SpillStore(limit), list[str]()
    for i, question in enumerate(questions):
        tensors, text = encode_calls([question.source, question.target])
        store.put(i, tuple(tensors))
        texts.append(text)
    return LazySequence(len(texts), lambda i: Question(*decode_calls(store.get(i), texts[i])))
