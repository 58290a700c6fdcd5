"""Which file a base model was, for the provenance of what was made from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

from ..errors import UnsupportedFormat
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
    state = _file_state(file)
    return (cache or BasisCache(None)).file_hash(file, "sha256", lambda: _hash_whole(*state))


def compute_short_hash(base: Base) -> str | None:
    """The eight digits that kohya writes as `ss_sd_model_hash`, of a base that is one file."""
    if len(base.files) != 1:
        return None
    with _open_file(base.files[0]) as file:
        file.seek(_SHORT_START)
        return hashlib.sha256(file.read(_SHORT_SIZE)).hexdigest()[:8]


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
    digest = hashlib.sha256()
    for state in sorted(_file_state(file) for file in base.files):
        sampled = cache.file_hash(state[0], "sampled", partial(_hash_samples, *state))
        digest.update(sampled.encode())
    return f"sampled:{digest.hexdigest()}"


def _file_state(file: Path) -> tuple[Path, int, int]:
    """A file and what changes when it is rewritten."""
    try:
        status = file.stat()
    except OSError as error:
        raise UnsupportedFormat(f"{file}: is gone: {error.strerror}; run again") from error
    return file, status.st_size, status.st_mtime_ns


@contextmanager
def _open_file(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UnsupportedFormat(f"{path}: cannot be read: {error.strerror}; run again") from error


@lru_cache(maxsize=64)
def _hash_whole(path: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with _open_file(path) as file:
        while block := file.read(_SAMPLE):
            digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _hash_samples(path: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256(f"{size} ".encode())
    with _open_file(path) as file:
        for i in range(_SAMPLES):
            file.seek(i * max(0, size - _SAMPLE) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
