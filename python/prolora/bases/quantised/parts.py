"""A checkpoint's keys, while parts of quantised weights are joined."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ...errors import UnsupportedFormat
from ...files.jsontext import parse_json_object
from ..weights import Weight

_NOTE_LIMIT = 65_536
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")

_LARGEST_SIZE = 2**32
_MOST_AXES = 8

Metadata = Mapping[str, str]


def read_sizes(value: object) -> tuple[int, ...] | None:
    """Reads a list of sizes of axes in a note; None for anything else."""
    if not isinstance(value, list) or not 0 < len(value) <= _MOST_AXES:
        return None
    whole = all(type(n) is int and 0 < n < _LARGEST_SIZE for n in value)
    return tuple(value) if whole else None


@dataclass
class CheckpointParts:
    """Weights and parts of weights by key; what belongs together is joined."""

    weights: Mapping[str, Weight]  # all keys of the checkpoint
    metadata: tuple[Metadata, ...]  # of the header of each of its files
    where: str  # its name in messages
    _joined: dict[str, Weight | None] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        """Yields the keys that belong to nothing yet."""
        return (key for key in self.weights if key not in self._joined)

    def get(self, key: str) -> Weight | None:
        """Returns what a key holds, unless it is joined already."""
        return None if key in self._joined else self.weights.get(key)

    def need(self, key: str, what: str) -> Weight:
        """Returns what a key holds, which `what` needs.

        Raises:
            UnsupportedFormat: the key is missing.
        """
        part = self.get(key)
        if part is None:
            raise self.refuse(f"{key} is missing, which {what} needs; download it again")
        return part

    def join(self, keys: Iterable[str], name: str, weight: Weight) -> None:
        """Replaces some keys by one weight under the name of one of them."""
        self._joined |= dict.fromkeys(keys) | {name: weight}

    def drop(self, key: str) -> None:
        """Leaves out what says nothing of a weight."""
        self._joined[key] = None

    def list_weights(self) -> dict[str, Weight]:
        """Returns the weights, in the order of the file."""
        listed = ((key, self._joined.get(key, weight)) for key, weight in self.weights.items())
        return {key: weight for key, weight in listed if weight is not None}

    def read_note(self, key: str) -> dict[str, object]:
        """Reads the JSON text in a tensor of bytes.

        Raises:
            UnsupportedFormat: it holds none.
        """
        weight = self.weights[key]
        if weight.dtype != torch.uint8 or math.prod(weight.shape) > _NOTE_LIMIT:
            raise self.refuse(f"{key} is not a note of a quantised layer")
        text = bytes(weight.read().flatten().tolist())
        return parse_json_object(text, f"{self.where}: {key}")

    def check_codes(
        self, key: str, dtypes: Collection[torch.dtype] = (), axes: int | None = None
    ) -> Weight:
        """Returns the codes of a weight, with rows and columns, of an allowed dtype.

        Args:
            key: of the codes.
            dtypes: allowed dtypes; empty for any.
            axes: how many they must have; None for any number of them.

        Raises:
            UnsupportedFormat: the key is missing, or says what is stored instead.
        """
        stored = self.need(key, "a quantised weight")
        fits = (not dtypes or stored.dtype in dtypes) and axes in (None, len(stored.shape))
        if not fits or not stored.shape or not all(stored.shape):
            wanted = " or ".join(map(str, dtypes)) or "codes"
            raise self.refuse(
                f"{key} is {stored.dtype} {list(stored.shape)}, not {wanted} of a "
                f"{'matrix' if axes == 2 else 'weight'}; download it again"
            )
        return stored

    def check(self, key: str, dtypes: Iterable[torch.dtype], shape: tuple[int, ...]) -> Weight:
        """Returns a part with the dtype and shape that the others need.

        Trailing sizes of 1 count as none; others tell rows and columns apart.

        Raises:
            UnsupportedFormat: says what it is instead.
        """
        part = self.need(key, "a quantised weight")
        ones = (1,) * (len(part.shape) - len(shape))
        if part.dtype not in (allowed := tuple(dtypes)) or part.shape != shape + ones:
            raise self.refuse(
                f"{key} is {part.dtype} {list(part.shape)}, not {' or '.join(map(str, allowed))} "
                f"{list(shape)} as the weight that it belongs to needs; download it again"
            )
        return part

    def refuse(self, why: str) -> UnsupportedFormat:
        """Makes the error that says what is wrong with the checkpoint."""
        return UnsupportedFormat(f"{self.where}: {why}")
