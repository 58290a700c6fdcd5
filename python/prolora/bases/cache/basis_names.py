"""The names of bases: by the content of the weight, and by what was asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...core.ops.native import fingerprint
from ...core.parallel import map_on_threads
from ...core.rank_rule import Rank
from ...files.hashing import hash_parts, hash_text
from .basis_file import StoredBasis
from .cache_folder import VERSION

# What bases are computed to, `truncated_svd`'s default.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class BasisRequest:
    """The bases of a stack of weights, as far as the folder holds them.

    Attributes:
        shape: of every weight, m × n.
        stored: of each weight the basis, or None; empty where there is no folder.
        missing: the places of those that must be computed.
        descriptions: of each missing one, what its file says of it.
    """

    shape: tuple[int, int]
    stored: Sequence[StoredBasis | None]
    missing: Sequence[int]
    descriptions: Sequence[dict[str, str]] = ()


def hash_weight(weight: Tensor) -> str:
    """SHA-256 over a weight [m, n] as stored: dtype, shape and bytes."""
    return hash_parts([f"{weight.dtype} {list(weight.shape)} ", weight])


def hash_weights(weights: Tensor | Sequence[Tensor]) -> list[str]:
    """Of every matrix of a stack [b, m, n], or of several [m, n], over the threads."""
    return map_on_threads(hash_weight, list(weights))


def basis_name(digest: str, rank: Rank) -> str:
    """The name of a basis: of what, by which rule, how exact, by which version and kernels."""
    return hash_text(f"{digest} {rank!r} {TOLERANCE} {VERSION}{fingerprint()}")


def describe_basis(name: str, rank: Rank, base: str, module: str) -> dict[str, str]:
    """What the file of a basis says of it, beside its numbers."""
    return {"name": name, "rule": repr(rank), "base": base, "module": module}


def short_hash(text: str) -> str:
    """A name for a text, where 128 bits are enough."""
    return hash_text(text)[:32]
