"""Which files prolora wrote itself, and may therefore replace.

Such a file holds a mark: `prolora:sha256:` and 64 digits, the digest of the whole file with zeros in
the place of those digits. A file that was edited, trained on or saved again by another tool has
another digest, though it kept the mark; a text that merely quotes a mark has another one, too.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from ..errors import ForeignFile, output_error

MARK_KEY = "prolora.mark"
"""The entry of a safetensors header that holds the mark."""
WRITTEN_BY = "written_by"
"""The entry of a JSON object that holds it."""
UNSIGNED = "prolora:sha256:" + "0" * 64
"""A mark that `sign` fills in: it is put into a text wherever that kind of text can hold it."""

_MARK = re.compile(rb"prolora:sha256:([0-9a-f]{64})")
# Bytes of a file in which its mark is looked for: no header of a safetensors file is longer.
_HEAD_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20
# How many marks are tried of those that a file holds: others than its own are quoted in it.
_MOST_MARKS = 8
_PNG = b"\x89PNG\r\n\x1a\n"
# Length, type and checksum of the empty chunk that ends a PNG file.
_PNG_END = 12


def sign(data: bytes) -> bytes:
    """Fills in the first `UNSIGNED` mark; a text without one comes back as it is."""
    return data.replace(UNSIGNED.encode(), compute_mark([data]).encode(), 1)


def sign_png(data: bytes) -> bytes:
    """A PNG file with a mark in a chunk of text at its end, which viewers ignore."""
    text = b"tEXtprolora\0" + UNSIGNED.encode()
    start, end = data[:-_PNG_END], data[-_PNG_END:]
    # A checksum of zeros, which the digest is of: it depends on the mark.
    length = (len(text) - 4).to_bytes(4, "big")
    mark = compute_mark([start, length, text, bytes(4), end])
    text = text.replace(UNSIGNED.encode(), mark.encode())
    return start + length + text + zlib.crc32(text).to_bytes(4, "big") + end


def compute_mark(parts: Iterable[bytes | memoryview]) -> str:
    """The mark of what the parts make together, one of which holds `UNSIGNED`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return f"prolora:sha256:{digest.hexdigest()}"


def is_own(path: Path) -> bool:
    """Whether prolora wrote a file, and nobody has changed it since.

    A file without a mark in its first 32 MiB is read no further.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
        found = dict.fromkeys(match[1] for match in _MARK.finditer(head))
        digests = {mark: hashlib.sha256(_blank(head, mark)) for mark in [*found][:_MOST_MARKS]}
        while digests and (block := file.read(_BLOCK_BYTES)):
            for digest in digests.values():
                digest.update(block)
    return any(digest.hexdigest().encode() == mark for mark, digest in digests.items())


def check_replaceable(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuses an output path that holds a file which prolora did not write.

    An empty file, as `mktemp` makes one, holds nothing that could be lost.

    Args:
        path: the output; a symbolic link stands for what it points to.
        overwrite: replace whatever is there.

    Raises:
        ForeignFile: it holds one, or one that was changed since.
        OutputError: what is there cannot be read.
    """
    # `check_writable` refuses what is there and no file.
    if overwrite or not os.path.isfile(path):
        return
    try:
        if os.path.getsize(path) == 0 or is_own(Path(path)):
            return
    except OSError as error:
        raise output_error(path, error, "exists and cannot be read") from error
    raise ForeignFile(
        f"{os.fspath(path)}: exists and was not written by prolora, or was changed since, so it is "
        "not replaced; choose another name, or allow it to be overwritten"
    )


def _blank(head: bytes, mark: bytes) -> bytes:
    """The beginning of a file with zeros for the first place that holds a mark's digits.

    In a PNG file also for the checksum behind it.
    """
    start = head.index(b"prolora:sha256:" + mark) + len(b"prolora:sha256:")
    stop = start + len(mark)
    sum_bytes = 4 if head.startswith(_PNG) else 0
    return head[:start] + b"0" * len(mark) + bytes(sum_bytes) + head[stop + sum_bytes :]
