"""The names of bases: by the content of the weight, and by what was asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...core.parallel import map_on_threads
from ...core.rank_rule import Rank
from ...files.hashing import hash_parts, hash_text
from .basis_file import StoredBasis
from .cache_folder import VERSION

# The tolerance of bases, `truncated_svd`'s default.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class BasisRequest:
    """The bases of a stack of weights, as the folder holds them."""

    shape: tuple[int, int]  # of every weight, m × n
    # The basis of each weight, or None; empty without a folder
    stored: Sequence[StoredBasis | None]
    missing: Sequence[int]  # indices of the weights that must be computed
    descriptions: Sequence[dict[str, str]] = ()  # what the file of each missing one says of it


def hash_weight(weight: Tensor) -> str:
    """Computes SHA-256 over a weight [m, n] as stored: dtype, shape and bytes."""
    return hash_parts([f"{weight.dtype} {list(weight.shape)} ", weight])


def hash_weights(weights: Tensor | Sequence[Tensor]) -> list[str]:
    """Hashes every matrix of a stack [b, m, n], or several [m, n], on threads."""
    return map_on_threads(hash_weight, list(weights))


def basis_name(digest: str, rank: Rank) -> str:
    """Returns a basis's name, made of weight, rule, tolerance and version."""
    return hash_text(f"{digest} {rank!r} {TOLERANCE} {VERSION}")


def describe_basis(name: str, rank: Rank, base: str, module: str) -> dict[str, str]:
    """Returns what the file of a basis says of it, beside its numbers."""
    return {"name": name, "rule": repr(rank), "base": base, "module": module}


def short_hash(text: str) -> str:
    """Shortens a text to a name of 128 bits."""
    return hash_text(text)[:32]
