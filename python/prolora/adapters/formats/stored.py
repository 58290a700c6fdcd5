"""Unchanged updates, written as their file holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...architectures.family import AuthorsWeight
from ...core.lowrank import LowRank
from ..adapter import Adapter, StoredUpdate
from ..keys.tensor_keys import find_adapter_name
from ..vectors import find_vector_module
from .groups import lay_out

_CONFIGURED = ("peft", "diffusers")  # formats that have a place for a scale beside the tensors


@dataclass(frozen=True)
class KeptTensors:
    """Stored tensors under the keys of a new file."""

    keys: Mapping[str, tuple[StoredUpdate, str]]  # new key -> whose tensor, and its old key
    owners: Mapping[str, StoredUpdate]  # module or vector -> the tensors behind it

    @property
    def need_config(self) -> bool:
        """Returns whether scales stand in a configuration, and not in tensors."""
        return any(one.configured for one in self.owners.values())

    @property
    def depend_on_base(self) -> int:
        """Counts the updates that their file states relative to the base's own weights."""
        kinds = {id(one): one.kind for one in self.owners.values()}.values()
        return sum("+dora" in kind or kind in ("oft", "glora") for kind in kinds)

    def read(self) -> dict[str, Tensor]:
        """Reads all tensors, each in the dtype that it is stored in."""
        return {new: one.read(old) for new, (one, old) in self.keys.items()}


def find_stored(adapter: Adapter, format: str) -> KeptTensors | None:
    """Returns the stored tensors behind an adapter under the names of a format.

    None where an update was changed since it was read, where a weight is fused or split on the
    way, or where the format has no place for a tensor or a scale.
    """
    behind = {
        id(_first_tensor(part)): (one, name)
        for one in adapter.stored
        for name, part in one.parts.items()
    }
    layout = lay_out(adapter, format)
    pieces: list[tuple[str | None, Mapping[str, LowRank | Tensor], AuthorsWeight | None]] = [
        *((group.path, group.parts, group.matrix) for group in layout.groups),
        *(
            (layout.vector_paths.get(find_vector_module(name)), {name: vector}, None)
            for name, vector in adapter.vectors.items()
        ),
    ]
    keys: dict[str, tuple[StoredUpdate, str]] = {}
    owners: dict[str, StoredUpdate] = {}
    for path, parts, matrix in pieces:
        stored = {name: behind.get(id(_first_tensor(part))) for name, part in parts.items()}
        one, _ = next(iter(stored.values())) or (None, "")
        old = {name: hit[1] for name, hit in stored.items() if hit and hit[0] is one}
        if one is None or path is None or not len(old) == len(parts) == len(one.parts):
            return None
        alike = _find_rows(one.matrix, old.values()) == _find_rows(matrix, old)
        if not (alike and _has_place(one, format)):
            return None
        keys |= {f"{path}{suffix}": (one, key) for suffix, key in one.keys.items()}
        owners |= dict.fromkeys(parts, one)
    return KeptTensors(keys, owners) if keys else None


def _first_tensor(part: LowRank | Tensor) -> Tensor:
    return part.up if isinstance(part, LowRank) else part


def _find_rows(matrix: AuthorsWeight | None, names: Iterable[str]) -> object:
    """Returns what tells which rows of a fused weight parts are; None for a module by itself."""
    if matrix is None or (len(matrix.parts) == 1 and matrix.swap == "never"):
        return None
    return matrix.shares, matrix.swap, [matrix.parts.index(name) for name in names]


def _has_place(one: StoredUpdate, format: str) -> bool:
    """Returns whether a format can say all of an update."""
    if any("processor" in key and "_lora" in key for key in one.keys.values()):
        return False  # names of old attention processors
    if any(map(find_adapter_name, one.keys.values())):
        return False
    if not one.configured:
        return True
    plain = one.kind.partition("+")[0] in ("lora", "locon")
    return plain and (format in _CONFIGURED or math.isclose(one.scale, 1.0))
