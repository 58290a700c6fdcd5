"""One basis in a file: 16 bits a number where that is exact enough, read whole and checked.

The columns of U and V are kept as whole numbers of 16 bits, each column with its own scale: half
the size of float32, and about five times as exact as float16, whose digits go by the size of each
entry. What this costs is measured when the file is written and is part of the `bound` of what is
read: for the stored X = U − E, both the sine of the angle to the true subspace and the error of the
projector XXᵀ grow by at most 2‖E‖ + ‖E‖². Where that passes the tolerance, the numbers are kept as
they are.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.basis import FACTS, Basis
from ...errors import ProLoRAError, UnsupportedFormat
from ...files.hashing import view_bytes
from ...files.safetensors_file import SafetensorsFile
from ...files.safetensors_writing import dump_safetensors
from ...files.store import put

METADATA_KEY = "prolora.basis"
LARGEST_INTEGER = 32767
# float32 errs this much, and more, in what it says of an error.
ERROR_SLACK = 1.01


@dataclass(frozen=True)
class StoredBasis:
    """The basis of one weight [m, n], as its file stores it."""

    # "U" [m, k], "S" [k], "V" [n, k]; for whole numbers also "U.scale" and "V.scale" [k]
    tensors: Mapping[str, Tensor]
    # The numbers known of it (`core.basis.FACTS`), its `rung`, its `name`, and where it was first
    # needed (`base`, `module`, `rule`).
    facts: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape m × n of the weight."""
        return self.tensors["U"].shape[0], self.tensors["V"].shape[0]

    @property
    def columns(self) -> int:
        """The columns in use, k."""
        return self.tensors["S"].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the basis that `fill` gives: float32, or float64."""
        return self.tensors["S"].dtype

    @property
    def compact(self) -> bool:
        """Whether U and V are kept in 16 bits."""
        return not self.tensors["U"].is_floating_point()

    def fill(self, name: str, out: Tensor) -> None:
        """Writes U or V into out [m or n, K ≥ k]; further columns become 0."""
        stored, k = self.tensors[name], self.columns
        out[:, k:] = 0
        out[:, :k] = stored
        if self.compact:
            out[:, :k] *= self.tensors[f"{name}.scale"]


def compress_basis(basis: Basis, tol: float) -> tuple[dict[str, Tensor], float]:
    """Returns a basis of one matrix as stored tensors, and its new bound."""
    bound = float(basis.bound)
    plain = {name: getattr(basis, name).detach().cpu().contiguous() for name in ("U", "S", "V")}
    if basis.U.dtype != torch.float32:
        return plain, bound
    short, worst = {"S": plain["S"]}, 0.0
    for name in ("U", "V"):
        scale = plain[name].abs().amax(0) / LARGEST_INTEGER
        scale = torch.where(scale > 0, scale, 1.0)
        short[name] = (plain[name] / scale).round_().to(torch.int16)
        short[f"{name}.scale"] = scale
        error = bound_norm(plain[name] - short[name] * scale)
        worst = max(worst, 2 * error + error * error)
    if bound + worst > tol:
        return plain, bound
    return short, bound + worst


def bound_norm(x: Tensor) -> float:
    """Returns an upper bound on ‖x‖₂ of x [m, k]: ‖(xᵀx)²‖_F^¼.

    It is within a factor k^⅛ of the norm.
    """
    largest = float(x.abs().amax()) if x.numel() else 0.0
    if largest == 0:
        return 0.0
    x = x / largest
    gram = x.mT @ x
    return ERROR_SLACK * largest * float(torch.linalg.matrix_norm(gram @ gram).sqrt().sqrt())


def write_basis(path: Path, stored: StoredBasis) -> None:
    """Keeps a basis, without forcing it to the disk: its checksum tells after a crash."""
    facts = dict(stored.facts) | {"checksum": compute_checksum(stored.tensors)}
    text = json.dumps(facts, sort_keys=True)
    header = {METADATA_KEY: text, f"{METADATA_KEY}.crc32": str(zlib.crc32(text.encode()))}
    write = lambda new: dump_safetensors(new, stored.tensors, header)  # noqa: E731
    put(path, write, overwrite=True, durable=False)


def compute_checksum(tensors: Mapping[str, Tensor]) -> int:
    """Computes CRC-32 of all bytes: against accidents, not against forgery."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(view_bytes(tensors[name]), total)
    return total


def make_stored_basis(basis: Basis, tol: float, about: Mapping[str, str]) -> StoredBasis:
    """Converts the basis of one weight [m, n], within a tolerance, to its file's form."""
    tensors, bound = compress_basis(basis, tol)
    facts: dict[str, Any] = {part: getattr(basis, part).item() for part in FACTS}
    facts |= {"bound": min(1.0, bound), "rung": basis.rung} | dict(about)
    return StoredBasis(tensors, facts)


def read_basis(path: Path) -> StoredBasis:
    """Reads a basis and checks its numbers against their checksum.

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
        return StoredBasis(tensors, facts)


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
    """Refuses a file without U [m, k], S [k] and V [n, k].

    Whole numbers need scales [k] as well.
    """
    if not {"U", "S", "V"} <= tensors.keys() or not {*FACTS, "rung", "name"} <= facts.keys():
        raise UnsupportedFormat("it is not a basis")
    k, compact = tensors["S"].shape, not tensors["U"].is_floating_point()
    scales = ("U.scale", "V.scale") if compact else ()
    fits = all(tensors[name].shape == k for name in ("S", *scales))
    fits &= all(x.ndim == 2 and x.shape[1:] == k for x in (tensors["U"], tensors["V"]))
    if not fits or len(k) != 1 or tensors["S"].dtype not in (torch.float32, torch.float64):
        raise UnsupportedFormat("its tensors do not fit together")
