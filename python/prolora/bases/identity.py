"""A base's identity: a digest over all its bytes.

It is remembered by the state of its files. A plain transfer to a new path needs none: only what
must not be taken for another base (results of a migration, what an extraction was made of, a LoRA
that was moved before) reads bases for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError, UnsupportedFormat
from ..files.hashing import hash_file, hash_parts, hash_text, read_blocks
from ..files.state import flush_file, read_state
from ..files.store import Store, put_text
from . import Base

# kohya's and A1111's short hash covers these bytes of a file.
_SHORT_START, _SHORT_SIZE = 0x100000, 0x10000
EMPTY_SHORT_HASH = hash_text("")[:8]
"""The short hash of every file that ends before those bytes."""
# Two writes within one tick of a file system's clock leave the same times: for a file that changed
# so shortly before it was hashed (ns), the digest is not remembered.
_SETTLING_TIME = 2_000_000_000
_PROBES, _BLOCK, _HINT_BYTES = 16, 1 << 20, 1 << 12

_known: dict[tuple[str, tuple[int, ...]], str] = {}


def digest_file(path: Path, memory: Path | None = None) -> str:
    """Returns the SHA-256 of a file, read once for each of its states.

    `memory` is a folder that remembers digests between runs; with None only this process does.

    Raises:
        UnsupportedFormat: it cannot be read, or is changed meanwhile.
    """
    flush_file(path)
    state = read_state(path)
    key = str(path.resolve()), tuple(state)
    note = Store(memory).path("files", key, suffix=".txt") if memory else None
    if key not in _known and note is not None:
        with suppress(OSError):
            _known[key] = note.read_text("ascii")
    if len(_known.get(key, "")) == 64:
        return _known[key]
    digest = hash_file(path)
    if read_state(path) != state:
        raise UnsupportedFormat(f"{path}: was changed while it was in use; run again")
    if time.time_ns() - max(state.modified, state.changed) > _SETTLING_TIME:
        _known[key] = digest
        if note is not None:
            with suppress(OSError, OutputError):  # nothing is lost but time
                note.unlink(missing_ok=True)  # a link leads to a file of others
                put_text(note, digest, overwrite=True)
    return digest


def compute_identity(base: Base, memory: Path | None = None) -> str | None:
    """Returns "sha256:…" of one file, "files:…" of several, None for a base from memory.

    `memory` as for `digest_file`.
    """
    digests = sorted(digest_file(file, memory) for file in base.files)
    if len(digests) == 1:
        return f"sha256:{digests[0]}"
    return f"files:{hash_parts(digests)}" if digests else None


def compute_short_hash(base: Base) -> str | None:
    """Returns the eight digits that kohya writes as `ss_sd_model_hash`, of a base of one file."""
    if len(base.files) != 1:
        return None
    return hash_file(base.files[0], _SHORT_START, _SHORT_SIZE)[:8]


def compute_hint(base: Base) -> str:
    """Returns "hint:1:…", of a few pieces of every file; "" for a base from memory.

    Where it is equal, two bases need not be; a header has it to know a renamed base again.
    """
    parts = sorted(hash_parts(_probe(file, _HINT_BYTES)) for file in base.files)
    return f"hint:{len(parts)}:{hash_parts(parts)[:16]}" if parts else ""


def _probe(file: Path, size: int) -> Iterator[bytes]:
    """Reads pieces that are evenly spaced over a file, after its length."""
    length = file.stat().st_size
    yield f"{length} ".encode()
    for start in sorted({i * max(0, length - size) // (_PROBES - 1) for i in range(_PROBES)}):
        yield from read_blocks(file, start, size)


def is_identical(
    base: Base, identity: str, short_hash: str | None = None, memory: Path | None = None
) -> bool | None:
    """Returns whether a base has that identity, whatever its files are called.

    Args:
        base: opened from files or from memory.
        identity: as `compute_identity` or `compute_hint` gave it; "" if that is not known.
        short_hash: as `compute_short_hash` gave it, if that is known: where it differs, the file is
            not read as a whole.
        memory: as for `digest_file`.

    Returns:
        None where the two cannot be compared.
    """
    if identity.startswith(f"hint:{len(base.files)}:"):
        return compute_hint(base) == identity
    kind = "sha256:" if len(base.files) == 1 else "files:"
    if not base.files or not identity.startswith(kind):
        return None
    if short_hash and len(base.files) == 1 and compute_short_hash(base) != short_hash:
        return False
    return compute_identity(base, memory) == identity


def have_equal_files(one: Base, other: Base) -> bool:
    """Returns whether two bases have the same bytes; reads on until something differs."""
    pairs = [
        sorted(base.files, key=lambda file: (file.stat().st_size, file.name))
        for base in (one, other)
    ]
    if [f.stat().st_size for f in pairs[0]] != [f.stat().st_size for f in pairs[1]]:
        return False
    # Fine-tunes share whole parts: pieces from everywhere tell sooner than the beginning.
    readers = (lambda file: _probe(file, _BLOCK)), read_blocks
    return all(
        x == y
        for read in readers
        for a, b in zip(*pairs, strict=True)
        for x, y in zip(read(a), read(b), strict=True)
    )
