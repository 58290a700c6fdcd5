"""One basis in a file, read whole and checked."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.basis import FACTORS, FACTS, Basis
from ...errors import ProLoRAError, UnsupportedFormat
from ...files.hashing import view_bytes
from ...files.safetensors_file import SafetensorsFile
from ...files.safetensors_writing import dump_safetensors
from ...files.store import put

METADATA_KEY = "prolora.basis"
_DTYPES = dict.fromkeys(FACTS, torch.float64) | {"rank": torch.int64, "ok": torch.bool}


def write_basis(path: Path, basis: Basis, name: str) -> None:
    """Keeps the basis of one weight, without forcing it to the disk.

    Its checksum tells after a crash.
    """
    tensors = {part: getattr(basis, part).contiguous() for part in FACTORS}
    facts: dict[str, Any] = {part: getattr(basis, part).item() for part in FACTS}
    facts |= {"rung": basis.rung, "name": name, "checksum": compute_checksum(tensors)}
    text = json.dumps(facts, sort_keys=True)
    header = {METADATA_KEY: text, f"{METADATA_KEY}.crc32": str(zlib.crc32(text.encode()))}
    write = lambda new: dump_safetensors(new, tensors, header)  # noqa: E731
    put(path, write, overwrite=True, durable=False)


def compute_checksum(tensors: Mapping[str, Tensor]) -> int:
    """Computes CRC-32 of all bytes: against accidents, not against forgery."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(view_bytes(tensors[name]), total)
    return total


def read_basis(path: Path) -> tuple[Basis, str]:
    """Reads a basis and its name, and checks its numbers against their checksum.

    The file is read, not mapped: what was checked stays what it was, whatever happens to the file.

    Raises:
        FileNotFoundError: the file is missing.
        UnsupportedFormat: it is damaged, or no basis.
        OSError: it cannot be read.
    """
    with _translate_errors(path):
        try:
            file, tensors = _read_file(path)
        except UnsupportedFormat:  # another process may have replaced it between two looks
            file, tensors = _read_file(path)
        facts = _read_facts(file)
        if facts["checksum"] != compute_checksum(tensors):
            raise UnsupportedFormat("its content is not what was written")
        _check_parts(tensors, facts)
        numbers = {part: torch.tensor(facts[part], dtype=_DTYPES[part]) for part in FACTS}
        return Basis(**tensors, **numbers, rungs=(str(facts["rung"]),)), str(facts["name"])


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Turns all faults of a file but its absence into UnsupportedFormat."""
    try:
        yield
    except (ProLoRAError, ValueError, KeyError, TypeError) as error:
        if not path.exists():
            raise FileNotFoundError(path) from error
        raise UnsupportedFormat(f"{path}: {error}") from error


def _read_file(path: Path) -> tuple[SafetensorsFile, dict[str, Tensor]]:
    file = SafetensorsFile(path)
    return file, file.read_all()


def _read_facts(file: SafetensorsFile) -> dict[str, Any]:
    text = file.metadata[METADATA_KEY]
    if file.metadata[f"{METADATA_KEY}.crc32"] != str(zlib.crc32(text.encode())):
        raise UnsupportedFormat("its header is not what was written")
    facts: dict[str, Any] = json.loads(text)
    if not isinstance(facts["bound"], float) or not math.isfinite(facts["bound"]):
        raise UnsupportedFormat("its header makes no sense")
    return facts


def _check_parts(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Refuses tensors other than U [m, k], S [k] and V [n, k]."""
    if tensors.keys() != {"U", "S", "V"} or not {*FACTS, "rung", "name"} <= facts.keys():
        raise UnsupportedFormat("it is not a basis")
    k = tensors["S"].shape
    fits = all(x.ndim == 2 and x.shape[1:] == k for x in (tensors["U"], tensors["V"]))
    dtypes = {x.dtype for x in tensors.values()}
    if not fits or len(k) != 1 or dtypes not in ({torch.float32}, {torch.float64}):
        raise UnsupportedFormat("its tensors do not fit together")
