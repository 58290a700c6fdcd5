"""Unchanged updates, written as their file holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...architectures.family import AuthorsWeight
from ...core.lowrank import LowRank
from ...errors import OutputError, ProLoRAError
from ..adapter import Adapter, StoredUpdate
from ..contents import parse_contents, read_scale
from ..lora import Lora, StrPath
from ..naming import BaseNames
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
        """Tells whether scales stand in a configuration, and not in tensors."""
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

    Args:
        adapter: what to write.
        format: "kohya", "diffusers", "peft" or "comfy".
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
        found = {name: behind.get(id(_first_tensor(part))) for name, part in parts.items()}
        one, _ = next(iter(found.values())) or (None, "")
        old = {name: hit[1] for name, hit in found.items() if hit and hit[0] is one}
        if one is None or path is None or not len(old) == len(parts) == len(one.parts):
            return None
        if not (_lie_alike(one.matrix, matrix, old) and _has_place(one, format)):
            return None
        keys |= {f"{path}{suffix}": (one, key) for suffix, key in one.keys.items()}
        owners |= dict.fromkeys(parts, one)
    return KeptTensors(keys, owners) if keys else None


def _first_tensor(part: LowRank | Tensor) -> Tensor:
    return part.up if isinstance(part, LowRank) else part


def _lie_alike(
    old: AuthorsWeight | None, new: AuthorsWeight | None, names: Mapping[str, str]
) -> bool:
    """Tells whether parts have the same rows of two fused weights; `names` are new -> old."""
    if _is_fused(old) != _is_fused(new):
        return False
    if old is None or new is None or not _is_fused(old):
        return True
    same = (old.shares, old.swap) == (new.shares, new.swap)
    return same and all(new.parts.index(a) == old.parts.index(b) for a, b in names.items())


def _is_fused(matrix: AuthorsWeight | None) -> bool:
    """Tells whether the authors' weight has other rows than one module."""
    return matrix is not None and (len(matrix.parts) > 1 or matrix.swap != "never")


def _has_place(one: StoredUpdate, format: str) -> bool:
    """Tells whether a format can say all of an update."""
    if any(suffix.startswith("_") or "processor" in key for suffix, key in one.keys.items()):
        return False  # names of old attention processors
    if not one.configured:
        return True
    plain = one.kind.partition("+")[0] in ("lora", "locon")
    return plain and (format in _CONFIGURED or math.isclose(one.scale, 1.0))


def verify_stored(
    output: Path | Mapping[str, Tensor],
    kept: KeptTensors,
    adapter: Adapter,
    where: StrPath,
) -> None:
    """Opens an output and compares what its keys and scales mean.

    Args:
        output: a file, a PEFT folder or a state dict.
        kept: whose tensors it has.
        adapter: what the output means.
        where: its name in messages.

    Raises:
        OutputError: something reads back differently.
    """
    try:
        with Lora.open(output) as back:
            contents = parse_contents(back, BaseNames(adapter.family, adapter.updates))
            meant = {name for name in kept.owners if name in adapter.updates}
            seen: set[str] = set()
            for slot in contents.slots:
                owned = [name for name in slot.module.modules if name in meant]
                if not owned or not math.isclose(
                    read_scale(slot, back), kept.owners[owned[0]].scale, rel_tol=1e-6
                ):
                    raise OutputError(f"{where}: {slot.module.name} reads back at another scale")
                seen |= set(owned)
    except OutputError:
        raise
    except ProLoRAError as error:
        raise OutputError(f"{where}: was written but cannot be read back: {error}") from error
    vectors = {vector.name for vector in contents.vectors}
    if seen != meant or vectors != set(adapter.vectors):
        name = next(iter((seen ^ meant) | (vectors ^ set(adapter.vectors))))
        raise OutputError(f"{where}: reads back with other modules than written: {name}")
