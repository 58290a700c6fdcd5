"""Which file a base model was, for the provenance of what was made from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

from ..errors import UnsupportedFormat
from ..files.hashing import hash_file, hash_parts, hash_text, read_blocks
from ..files.state import FileState, flush_file, read_state
from . import Base
from .cache.basis_cache import BasisCache

# From every file of a folder: the header of a safetensors file, and a few samples of its weights.
_SAMPLE = 1 << 20
_SAMPLES = 16
# kohya's and A1111's short hash is of these bytes of a file.
_SHORT_START, _SHORT_SIZE = 0x100000, 0x10000
_IDENTITIES = "file:", "sampled:"
EMPTY_SHORT_HASH = hash_text("")[:8]
"""The short hash of every file that ends before those bytes."""


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
    return _hash_short(base.files[0], read_state(base.files[0]))


def compute_identity(base: Base, cache: BasisCache | None = None) -> str | None:
    """Returns what tells a base from others: "file:…" of one file, "sampled:…" of several.

    No file is read as a whole: the digits are the SHA-256 of the size of every file and of 16
    pieces of 1 MiB, evenly spaced. None for a base that came from memory.
    """
    if not base.files:
        return None
    cache = cache or BasisCache(None)
    sampled = [
        cache.file_hash(file, "sampled", partial(_hash_samples, file, read_state(file)))
        for file in sorted(base.files)
    ]
    return f"{_IDENTITIES[len(base.files) > 1]}{hash_parts(sampled)}"


def is_identical(
    base: Base, identity: str, short_hash: str | None = None, cache: BasisCache | None = None
) -> bool | None:
    """Tells whether a base has that identity, whatever its files are called.

    Args:
        base: opened from files or from memory.
        identity: as `compute_identity` gave it, or "sha256:…" of one whole file; "" if not known.
        short_hash: as `compute_short_hash` gave it, if that is known: where it differs, 64 KiB of
            the base tell.
        cache: remembers the hashes of files.

    Returns:
        None where the two cannot be compared: one file has another identity than several, and a
        base in memory has none.
    """
    one = len(base.files) == 1
    whole = one and identity.startswith("sha256:")
    if not base.files or not (whole or identity.startswith(_IDENTITIES[not one])):
        return None
    if short_hash and one and compute_short_hash(base) != short_hash:
        return False
    own = f"sha256:{compute_sha256(base, cache)}" if whole else compute_identity(base, cache)
    return own == identity


@lru_cache(maxsize=256)
def _hash_short(path: Path, state: FileState) -> str:
    """The short hash of a file in that state."""
    return hash_file(path, _SHORT_START, _SHORT_SIZE)[:8]


@lru_cache(maxsize=64)
def _hash_whole(path: Path, state: FileState) -> str:
    """The SHA-256 of a file in that state."""
    with _keep_state(path, state):
        return hash_file(path)


@lru_cache(maxsize=256)
def _hash_samples(path: Path, state: FileState) -> str:
    """The SHA-256 of the size and of pieces of a file in that state."""
    starts = (i * max(0, state.size - _SAMPLE) // (_SAMPLES - 1) for i in range(_SAMPLES))
    with _keep_state(path, state):
        pieces = (block for start in starts for block in read_blocks(path, start, _SAMPLE))
        return hash_parts(chain([f"{state.size} "], pieces))


def sample_file(path: Path) -> str:
    """The SHA-256 of the size of a file and of 16 pieces of 1 MiB: all of a file up to 16 MiB.

    Raises:
        UnsupportedFormat: it cannot be read, or is changed meanwhile.
    """
    return _hash_samples(path, read_state(path))


@contextmanager
def _keep_state(path: Path, state: FileState) -> Iterator[None]:
    """Lets the body read a file whose hash will be known by that state.

    Raises:
        UnsupportedFormat: the file is in another state afterwards.
    """
    flush_file(path)
    yield
    if read_state(path) != state:
        raise UnsupportedFormat(f"{path}: was changed while it was in use; run again")


def compute_fingerprint(base: Base, cache: BasisCache | None = None) -> str:
    """What tells this base from others at the price of 16 MiB a file; "" for one from memory.

    Not comparable with `compute_identity`, which reads a single file as a whole.

    Args:
        base: opened from files or from memory.
        cache: remembers the hashes of files between runs.
    """
    if not base.files:
        return ""
    cache = cache or BasisCache(None)
    sampled = sorted(
        cache.file_hash(file, "sampled", partial(_hash_samples, file, read_state(file)))
        for file in base.files
    )
    return hash_parts(sampled)[:16]
