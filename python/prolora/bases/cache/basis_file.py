"""One basis in a file, read whole and checked."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.basis import FACTORS, FACTS, Basis
from ...core.projectors import AnyBasis, Projector, Projectors
from ...errors import ProLoRAError, UnsupportedFormat
from ...files.hashing import view_bytes
from ...files.safetensors_file import SafetensorsFile
from ...files.safetensors_writing import dump_safetensors
from ...files.store import put

METADATA_KEY = "prolora.basis"
_CHECKSUM = f"{METADATA_KEY}.crc32"
_DTYPES = dict.fromkeys(FACTS, torch.float64) | {"rank": torch.int64, "ok": torch.bool}


def write_basis(path: Path, basis: AnyBasis, name: str) -> None:
    """Stores the basis or the projectors of one weight, without forcing them to the disk.

    A crash may leave a damaged file; its checksum shows that.
    """
    facts: dict[str, Any]
    if isinstance(basis, Projectors):
        tensors = {"left": basis.left.rows[0], "right": basis.right.rows[0]}
        facts = {part: getattr(basis, part).item() for part in ("rank", "bound", "ok")}
        facts |= {"leading": bool(basis.left.leading), "solver": basis.solvers[0]}
    else:
        tensors = {part: getattr(basis, part) for part in FACTORS}
        facts = {part: getattr(basis, part).item() for part in FACTS} | {"solver": basis.solver}
    tensors = {part: tensor.contiguous() for part, tensor in tensors.items()}
    text = json.dumps(facts | {"name": name}, sort_keys=True)
    header = {METADATA_KEY: text, _CHECKSUM: _compute_checksum(tensors, text)}
    write = lambda new: dump_safetensors(new, tensors, header)  # noqa: E731
    put(path, write, overwrite=True, durable=False, follow=False)


def _compute_checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Computes CRC-32 of a header's text and all bytes: against accidents, not against forgery."""
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(view_bytes(tensors[name]), total)
    return str(total)


def read_basis(path: Path) -> tuple[AnyBasis, str]:
    """Reads a basis or projectors and the name, and checks its numbers against their checksum.

    The file is read, not mapped: what was checked stays what it was, whatever happens to the file.

    Raises:
        FileNotFoundError: the file is missing.
        UnsupportedFormat: it is damaged, or no basis.
        OSError: it cannot be read.
    """
    if not path.exists():  # the usual miss, whose message nobody reads
        raise FileNotFoundError(path)
    try:
        # Open all the time: another process may replace it meanwhile.
        with closing(SafetensorsFile(path, keep_open=True)) as file:
            tensors, text = file.read_all(), file.metadata[METADATA_KEY]
        if file.metadata[_CHECKSUM] != _compute_checksum(tensors, text):
            raise UnsupportedFormat("its content is not what was written")
        facts = json.loads(text)
        if "leading" in facts:
            return _read_projectors(tensors, facts), str(facts["name"])
        k = tensors["S"].shape
        fits = all(x.ndim == 2 and x.shape[1:] == k for x in (tensors["U"], tensors["V"]))
        dtypes = {x.dtype for x in tensors.values()}
        if not fits or len(k) != 1 or dtypes not in ({torch.float32}, {torch.float64}):
            raise UnsupportedFormat("its tensors do not fit together")
        numbers = {part: torch.tensor(facts[part], dtype=_DTYPES[part]) for part in FACTS}
        return Basis(**tensors, **numbers, solvers=(str(facts["solver"]),)), str(facts["name"])
    except (ProLoRAError, ValueError, KeyError, TypeError) as error:
        if not path.exists():
            raise FileNotFoundError(path) from error
        raise UnsupportedFormat(f"{path}: {error}") from error


def _read_projectors(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Projectors:
    """Reads the projectors of one weight, as a stack of one.

    Raises:
        UnsupportedFormat: the tensors do not fit together.
    """
    left, right = tensors["left"], tensors["right"]
    c = len(left)
    if left.ndim != 2 or right.ndim != 2 or len(right) != c or left.dtype != right.dtype:
        raise UnsupportedFormat("its tensors do not fit together")
    rank, bound = int(facts["rank"]), float(facts["bound"])
    leading, number = torch.tensor([bool(facts["leading"])]), torch.tensor([c])
    return Projectors(
        Projector(left[None], leading, number),
        Projector(right[None], leading, number),
        torch.tensor([rank]),
        torch.tensor([bound], dtype=torch.float64),
        torch.tensor([bool(facts["ok"])]),
        (str(facts["solver"]),),
    )
