"""Which file a base model was, for the provenance of what was made from it."""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

from ..files.hashing import hash_file, hash_parts, read_blocks
from ..files.state import FileState, read_state
from . import Base
from .cache.basis_cache import BasisCache

# From every file of a folder: the header of a safetensors file, and a few samples of its weights.
_SAMPLE = 1 << 20
_SAMPLES = 16
# kohya's and A1111's short hash is of these bytes of a file.
_SHORT_START, _SHORT_SIZE = 0x100000, 0x10000


def compute_sha256(base: Base, cache: BasisCache | None = None) -> str | None:
    """The SHA-256 of a base that is one file, None for all others; read once.

    Args:
        base: opened from files.
        cache: remembers the hashes of files between runs.
    """
    if len(base.files) != 1:
        return None
    file = base.files[0]
    hash_it = partial(_hash_whole, file, read_state(file))
    return (cache or BasisCache(None)).file_hash(file, "sha256", hash_it)


def compute_short_hash(base: Base) -> str | None:
    """The eight digits that kohya writes as `ss_sd_model_hash`, of a base that is one file."""
    if len(base.files) != 1:
        return None
    return hash_file(base.files[0], _SHORT_START, _SHORT_SIZE)[:8]


def compute_identity(base: Base, cache: BasisCache | None = None) -> str | None:
    """What tells this base from others: "sha256:…" of one file, "sampled:…" of several.

    A folder of shards is not read as a whole: its identity is the SHA-256 of the size of every file
    and of 16 pieces of 1 MiB, evenly spaced, which no two different checkpoints share. None for a
    base that came from memory.
    """
    if not base.files:
        return None
    if len(base.files) == 1:
        return f"sha256:{compute_sha256(base, cache)}"
    cache = cache or BasisCache(None)
    sampled = [
        cache.file_hash(file, "sampled", partial(_hash_samples, file, read_state(file)))
        for file in sorted(base.files)
    ]
    return f"sampled:{hash_parts(sampled)}"


# Equal states, equal content: the second argument is there for that alone.
@lru_cache(maxsize=64)
def _hash_whole(path: Path, state: FileState) -> str:
    return hash_file(path)


@lru_cache(maxsize=256)
def _hash_samples(path: Path, state: FileState) -> str:
    starts = (i * max(0, state.size - _SAMPLE) // (_SAMPLES - 1) for i in range(_SAMPLES))
    pieces = (block for start in starts for block in read_blocks(path, start, _SAMPLE))
    return hash_parts(chain([f"{state.size} "], pieces))
