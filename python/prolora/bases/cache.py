"""Subspaces kept on disk: they belong to a base model alone, so the second LoRA finds them there.

A file for each weight, named by the content of the tensor and by what was asked of it: fine-tunes
that share a tensor share its file, and a renamed checkpoint finds its own. Files are written whole
or not at all, so processes may share a folder; a file that is damaged, foreign or of another
version is recomputed and never trusted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OutputError, ProLoRAError
from ..linalg.basis import FACTORS, FACTS, Basis, stack_bases, truncated_svd
from ..linalg.choice import Rank
from ..storage import SafetensorsFile, write_safetensors

# Part of every name: raise it when an algorithm's results change.
VERSION = 1
_DTYPES = dict.fromkeys(FACTS, torch.float64) | {"rank": torch.int64, "ok": torch.bool}

log = logging.getLogger(__name__)


class BasisCache:
    """A folder of bases.

    Attributes:
        folder: made if it does not exist.
        hits: bases taken from the folder so far.
        misses: bases computed so far.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens the folder.

        Raises:
            OutputError: it cannot be made.
        """
        self.folder = Path(folder)
        self.hits = self.misses = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: the cache folder cannot be made: {error}") from error

    def bases(self, weights: Tensor, rank: Rank) -> Basis:
        """`truncated_svd` of a stack [b, m, n], each matrix from the folder where it is there."""
        keys = [key(weight, rank) for weight in weights]
        found = [self._read(name, weights.shape[1:]) for name in keys]
        missing = [i for i, basis in enumerate(found) if basis is None]
        if missing:
            computed = truncated_svd(weights[missing], rank)
            for place, i in enumerate(missing):
                found[i] = computed[place].to("cpu")
                self._write(keys[i], computed[place])
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        whole = stack_bases([basis for basis in found if basis is not None])
        return whole.to(weights.device)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, name: str, shape: torch.Size) -> Basis | None:
        """The basis of that name, or None where there is none that can be trusted."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            file = SafetensorsFile(path)
            tensors = {part: file.read(part) for part in FACTORS}
            facts: dict[str, Any] = json.loads(file.metadata["prolora.basis"])
            if facts["checksum"] != _checksum(tensors) or facts["name"] != name:
                raise ValueError("its content is not what was written")
            scalars = {part: torch.tensor(facts[part], dtype=_DTYPES[part]) for part in FACTS}
            basis = Basis(**tensors, **scalars, rungs=(str(facts["rung"]),))
            if basis.shape != shape:
                raise ValueError(f"it is for a weight {list(basis.shape)}")
        except (ProLoRAError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not used and will be made again: %s", path, error)
            return None
        return basis

    def _write(self, name: str, basis: Basis) -> None:
        """Keeps a basis of one matrix; a full or read-only disk costs only the time to come."""
        tensors = {part: getattr(basis, part).contiguous().cpu() for part in FACTORS}
        facts = {part: getattr(basis, part).item() for part in FACTS}
        facts |= {"rung": basis.rung, "name": name, "checksum": _checksum(tensors)}
        path = self._path(name)
        try:
            path.parent.mkdir(exist_ok=True)
            write_safetensors(path, tensors, {"prolora.basis": json.dumps(facts)})
        except (OutputError, OSError) as error:
            log.warning("the basis could not be kept: %s", error)


def key(weight: Tensor, rank: Rank) -> str:
    """SHA-256 over a weight [m, n] as stored (shape, dtype, bytes), the rank rule and VERSION."""
    digest = hashlib.sha256(f"{VERSION} {rank!r} {weight.dtype} {list(weight.shape)} ".encode())
    digest.update(_bytes(weight))
    return digest.hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over all values: a flipped bit shows."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(_bytes(tensors[name]), total)
    return total


def _bytes(tensor: Tensor) -> Any:
    """The values as a buffer of bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
