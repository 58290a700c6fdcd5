"""A base's identity: digests of all that some work read of it, and names made of a few weights.

Work depends on every header, on the index of the shards or of the pipeline, and on the tensors that
it read; what it did not read is not hashed and does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..architectures.modules import TEXT_ENCODERS, find_component
from ..files.hashing import hash_file, hash_parts, hash_text
from . import Base
from .folder import MODELS
from .leaves import digest_file
from .pipeline_files import PIPELINE_INDEX

# kohya's and A1111's short hash covers these bytes of a file.
_SHORT_START, _SHORT_SIZE = 0x100000, 0x10000
EMPTY_SHORT_HASH = hash_text("")[:8]
"""The short hash of every file that ends before those bytes."""
NAMED_BY = "weights:"
"""What names made of a few weights begin with."""
# The weights in these places, by size, name a base: what a fine-tune changes, and quickly read.
_PLACES = (1 / 8, 1 / 4, 3 / 8)

_CONFIGURATIONS = (
    PIPELINE_INDEX,
    "scheduler/scheduler_config.json",
    *(f"{model}/config.json" for model in MODELS),
)
"""What a transfer reads of a pipeline beside its weights."""

Used = Sequence[set[str]]
"""The tensors that work depends on, of each file of a base."""


@contextmanager
def record_reads(*bases: Base, for_all: bool = False) -> Iterator[list[Used]]:
    """Yields the tensors of each base that are read in the body.

    What is read outside of any record, or in one `for_all`, belongs to all later ones as well.
    """
    records: list[Used] = [[set() for _ in base.leaves] for base in bases]
    leaves = [one for base in bases for one in base.leaves]
    pairs = list(zip(leaves, (used for record in records for used in record), strict=True))
    for one, used in pairs:
        one.records = [*one.records, used]
    try:
        yield records
    finally:
        for one, used in pairs:
            one.records = [other for other in one.records if other is not used]
            one.always |= used if for_all else set()
            used |= one.always


def describe_reads(base: Base, used: Used) -> dict[str, str]:
    """Returns which tensors work depends on, and the digest of these, headers and small files.

    The tensors are bits of a hexadecimal number, in the order of files and headers.
    """
    pairs = list(zip(base.leaves, used, strict=True))
    bits = "".join("01"[key in keys] for one, keys in pairs for key in one.file.tensors)
    small = [one.beside for one in base.leaves if one.beside]
    if base.path is not None:
        small += [base.path / name for name in _CONFIGURATIONS]
    parts = [one.file.header_digest for one in base.leaves]
    parts += [hash_file(file) if file.is_file() else "" for file in dict.fromkeys(small)]
    parts += [one.digest(key) for one, keys in pairs for key in one.file.tensors if key in keys]
    return {"read": f"{int(bits or '0', 2):x}", "digest": hash_parts(parts)}


def is_unchanged(base: Base, reads: Any) -> bool:
    """Returns whether a base has all that `describe_reads` found; reads what is not known."""
    count = sum(len(one.file.tensors) for one in base.leaves)
    text = reads.get("read") if isinstance(reads, Mapping) else None
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]+", text) or len(text) > count:
        return False
    bits = iter(f"{int(text, 16):0{count}b}"[-count:])
    used = [{key for key in one.file.tensors if next(bits) == "1"} for one in base.leaves]
    return bool(describe_reads(base, used) == reads)


def name_base(base: Base) -> str:
    """Returns "weights:…", made of three weights, whatever files they are in; "" in memory.

    Fine-tunes may share these: it names a base for people and files, and is no proof.
    """
    if not base.leaves:
        return ""
    models = [name for name in base.shapes if find_component(name) not in TEXT_ENCODERS]
    sizes = sorted((base.shapes[name], name) for name in models or base.shapes)
    names = [sizes[int(place * len(sizes))][1] for place in _PLACES] if sizes else []
    return NAMED_BY + hash_parts(f"{name} {base.weights[name].content} " for name in names)[:16]


def compute_short_hash(base: Base) -> str | None:
    """Returns the eight digits that kohya writes as `ss_sd_model_hash`, of a base of one file."""
    if len(base.files) != 1:
        return None
    return hash_file(base.files[0], _SHORT_START, _SHORT_SIZE)[:8]


def is_identical(
    base: Base, identity: str, short_hash: str | None = None, memory: Path | None = None
) -> bool | None:
    """Returns whether a base has that identity, whatever its files are called.

    Args:
        base: opened from files or from memory.
        identity: "sha256:…" of one file, or what `name_base` returned; "" if that is not known.
        short_hash: as `compute_short_hash` gave it, if that is known: where it differs, the file is
            not read as a whole.
        memory: a folder that remembers digests between runs.

    Returns:
        None where the two cannot be compared.
    """
    if identity.startswith(NAMED_BY) and base.leaves:
        return name_base(base) == identity
    if len(base.files) != 1 or not identity.startswith("sha256:"):
        return None
    if short_hash and compute_short_hash(base) != short_hash:
        return False
    return f"sha256:{digest_file(base.files[0], memory)}" == identity


def have_equal_files(one: Base, other: Base) -> bool:
    """Returns whether two bases have the same headers and tensors; stops at a difference."""
    pairs = list(zip(one.leaves, other.leaves, strict=False))
    same = len(one.leaves) == len(other.leaves)
    same = same and all(a.file.header_digest == b.file.header_digest for a, b in pairs)
    if not same or name_base(one) != name_base(other):  # fine-tunes share whole parts
        return False
    return all(a.digest(key) == b.digest(key) for a, b in pairs for key in a.file.tensors)
