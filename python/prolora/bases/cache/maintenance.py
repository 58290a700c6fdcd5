"""What is in a cache folder: listed, verified, and thrown away."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...architectures.modules import is_adaptable, matrix_shape
from ...core.precision import in_full_precision
from ...core.rank_rule import Rank, read_rank
from ...errors import ProLoRAError
from .. import BaseLike, open_base
from ..base import Progress
from . import basis_file
from .basis_cache import BasisCache
from .basis_names import basis_name, hash_weight
from .cache_folder import VERSION, CacheEntry, list_entries, remove_entries

# A temporary file that nobody has written to for so long (s) belongs to a process that is dead.
STALE_SECONDS = 3600
# Orthonormal columns of 16 bits each err this much at most; beyond it something is wrong.
MAX_SKEW = 2e-3


@dataclass(frozen=True)
class BasisGroup:
    """The bases that one base model was the first to need, by one rank rule.

    Attributes:
        base: name of the base model; "" for weights that were in memory.
        rule: the rank rule: columns, or share of energy.
        count: bases.
        size: bytes.
        dtypes: how U and V are kept: "int16", "float32", "float64".
        columns_min, columns_max: k.
        bound: the largest bound on the sine of an angle to the true subspace.
        used: when the last of them was used, in seconds since 1970, to a day.
    """

    base: str
    rule: str
    count: int
    size: int
    dtypes: str
    columns_min: int
    columns_max: int
    bound: float
    used: float


@dataclass(frozen=True)
class Inventory:
    """What a folder holds.

    Attributes:
        folder: which.
        shelves: bases of this version, by base model and rank rule.
        size: bytes of everything, index and tables too.
        notes: bytes of index, tables and marker.
        temporary: (files, bytes) that writers at work, or killed, have left.
        foreign: (files, bytes) of other versions, and what is damaged.
    """

    folder: Path
    shelves: list[BasisGroup]
    size: int
    notes: int
    temporary: tuple[int, int]
    foreign: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"folder": str(self.folder)}


def take_inventory(folder: str | PathLike[str]) -> Inventory:
    """Looks through a cache folder, at headers alone; one that does not exist is empty."""
    folder = Path(folder)
    shelves: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any], int, float]]] = {}
    counts = {"notes": [0, 0], "temporary": [0, 0], "foreign": [0, 0]}

    def count(kind: str, size: int) -> None:
        counts[kind][0] += 1
        counts[kind][1] += size

    for entry in list_entries(folder):
        if entry.kind == "temporary":
            count("temporary", entry.size)
        elif entry.version != VERSION:
            count("foreign", entry.size)
        elif entry.kind != "basis":
            count("notes", entry.size)
        else:
            try:
                facts, sizes = basis_file.read_basis_header(entry.path)
                place = str(facts.get("base", "")), str(facts.get("rule", ""))
            except FileNotFoundError:
                continue
            except (ProLoRAError, OSError):
                count("foreign", entry.size)
                continue
            shelves.setdefault(place, []).append((facts, sizes, entry.size, entry.modified))
    groups = [_summarise_group(*place, rows) for place, rows in sorted(shelves.items())]
    size = sum(kind[1] for kind in counts.values()) + sum(shelf.size for shelf in groups)
    return Inventory(
        folder,
        groups,
        size,
        counts["notes"][1],
        (counts["temporary"][0], counts["temporary"][1]),
        (counts["foreign"][0], counts["foreign"][1]),
    )


def _summarise_group(base: str, rule: str, rows: list[tuple[Any, Any, int, float]]) -> BasisGroup:
    columns = [sizes["S"][1][0] for _, sizes, _, _ in rows]
    dtypes = {str(sizes["U"][0]).removeprefix("torch.") for _, sizes, _, _ in rows}
    return BasisGroup(
        base=base,
        rule=rule,
        count=len(rows),
        size=sum(size for _, _, size, _ in rows),
        dtypes="+".join(sorted(dtypes)),
        columns_min=min(columns),
        columns_max=max(columns),
        bound=max(facts["bound"] for facts, _, _, _ in rows),
        used=max(used for _, _, _, used in rows),
    )


def measure_cache(folder: str | PathLike[str]) -> int:
    """Bytes of all files of a cache folder."""
    return sum(entry.size for entry in list_entries(Path(folder)))


@dataclass(frozen=True)
class VerifyResult:
    """What a verification found.

    Attributes:
        checked: bases whose numbers are those that were written.
        damaged: files that are not, with the reason.
        recomputed: bases held against the weights they were computed from.
        wrong: modules whose basis is not that of the weight, with the reason.
        absent: modules of the base without a basis of that rule here.
    """

    checked: int
    damaged: dict[str, str]
    recomputed: int = 0
    wrong: dict[str, str] | None = None
    absent: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damaged and not self.wrong

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"ok": self.ok}


@in_full_precision
def verify_cache(
    folder: str | PathLike[str],
    base: BaseLike | None = None,
    rank: Rank | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Reads every basis and compares it with its checksum; with a base, also with the weights.

    Args:
        folder: the cache folder.
        base: as `open_base` takes it: all its adaptable weights are read, hashed, and ‖WV − US‖/‖W‖
            and the orthonormality of U and V computed anew.
        rank: the rule whose bases are held against the weights.
        progress: called as progress(done, total, name).
    """
    checked, damaged = _verify_files(Path(folder), progress)
    if base is None or rank is None:
        return VerifyResult(checked, damaged)
    rank = read_rank(rank)
    opened, wrong, recomputed, absent = open_base(base), {}, 0, 0
    cache = BasisCache(folder)
    modules = [name for name in opened.shapes if is_adaptable(name)]
    for done, module in enumerate(modules, 1):
        weight = opened.read(module).reshape(matrix_shape(opened.shapes[module]))
        path = cache.path(basis_name(hash_weight(weight), rank))
        try:
            if str(path) not in damaged:
                stored = basis_file.read_basis(path)
                recomputed += 1
                if reason := _explain_disagreement(weight, stored):
                    wrong[module] = reason
        except FileNotFoundError:
            absent += 1
        except (ProLoRAError, OSError) as error:
            damaged[str(path)] = str(error)
        if progress:
            progress(done, len(modules), module)
    return VerifyResult(checked, damaged, recomputed, wrong, absent)


def _verify_files(folder: Path, progress: Progress | None) -> tuple[int, dict[str, str]]:
    """(bases that are what was written, {file that is not: reason}); what vanishes is neither."""
    files = [e.path for e in list_entries(folder) if e.kind == "basis" and e.version == VERSION]
    damaged: dict[str, str] = {}
    checked = 0
    for done, path in enumerate(files, 1):
        try:
            if basis_file.read_basis(path).facts.get("name") != path.stem:
                raise ProLoRAError("it is of another weight")
            checked += 1
        except FileNotFoundError:
            pass
        except (ProLoRAError, OSError) as error:
            damaged[str(path)] = str(error)
        if progress:
            progress(done, len(files), path.stem)
    return checked, damaged


def _explain_disagreement(weight: Tensor, stored: basis_file.StoredBasis) -> str:
    """Why a basis cannot be that of the weight [m, n]; "" if it can."""
    w = weight.double()
    u, v = (torch.empty(size, stored.columns, dtype=torch.float64) for size in stored.shape)
    stored.fill("U", u)
    stored.fill("V", v)
    s = stored.tensors["S"].double()
    norm = float(torch.linalg.matrix_norm(w)) or 1.0
    left = [w @ v - u * s, w.mT @ u - v * s]
    residual = max(float(torch.linalg.matrix_norm(part)) for part in left) / norm
    allowed = float(stored.facts["residual"]) + 2 * float(stored.facts["bound"])
    if residual > allowed:
        return f"residual {residual:.1e}, and {allowed:.1e} was promised"
    rank = int(stored.facts["rank"])
    eye = torch.eye(rank, dtype=torch.float64)
    skew = max(float((x[:, :rank].mT @ x[:, :rank] - eye).abs().max()) for x in (u, v))
    return f"its columns are not orthonormal: {skew:.1e}" if skew > MAX_SKEW else ""


@dataclass(frozen=True)
class PruneResult:
    """What was thrown away.

    Attributes:
        files: how many.
        size: bytes.
        left: bytes that are still there.
    """

    files: int
    size: int
    left: int


def prune_cache(
    folder: str | PathLike[str],
    *,
    older_than: float | None = None,
    max_size: int | None = None,
    everything: bool = False,
    dry_run: bool = False,
) -> PruneResult:
    """Deletes what is of no use: stale temporary files, other versions, damaged bases.

    Only files that prolora made are deleted, see `cache_folder`; symbolic links are not followed.

    Args:
        folder: the cache folder.
        older_than: also bases that were not used for so many seconds.
        max_size: also those that were not used for longest, until no more bytes are left.
        everything: all of the cache.
        dry_run: only say what would be deleted.

    Raises:
        OutputError: a file cannot be deleted.
    """
    folder, now, entries = Path(folder), time.time(), list(list_entries(Path(folder)))
    gone: list[CacheEntry] = []
    kept: list[CacheEntry] = []
    for entry in entries:
        if everything or _is_useless(entry, now, older_than):
            gone.append(entry)
        elif entry.kind == "basis":
            kept.append(entry)
    if max_size is not None:
        total = sum(entry.size for entry in kept)
        for entry in sorted(kept, key=lambda entry: (entry.modified, entry.size, entry.path)):
            if total <= max_size:
                break
            total -= entry.size
            gone.append(entry)
    if not dry_run:
        remove_entries(folder, gone)
    size = sum(entry.size for entry in gone)
    left = measure_cache(folder) - (size if dry_run else 0)
    return PruneResult(len(gone), size, left)


def _is_useless(entry: CacheEntry, now: float, older_than: float | None) -> bool:
    """Whether nothing will ever read a file of a cache, or a basis was not used for so long (s)."""
    age = now - entry.modified
    if entry.kind == "temporary":
        return age > STALE_SECONDS
    if entry.kind == "marker":  # goes with the last file of its folder
        return False
    if entry.version != VERSION:
        return True
    if entry.kind == "table":
        return False
    return (older_than is not None and age > older_than) or _is_damaged(entry.path)


def _is_damaged(path: Path) -> bool:
    """Whether the header of a basis is not what was written; what is gone is not damaged."""
    try:
        basis_file.read_basis_header(path)
    except FileNotFoundError:
        return False
    except (ProLoRAError, OSError):
        return True
    return False
