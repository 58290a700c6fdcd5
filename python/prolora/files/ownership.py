"""Which files prolora wrote itself, and may therefore replace.

Such a file holds a mark: what kind of file it is, and the digest of the file with zeros in the
place of the digest. A file that was edited, trained on or saved again by another tool has
another digest, though it kept the mark; a text that merely quotes a mark has another one, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ..errors import ForeignFile, output_error
from .hashing import hash_parts

MARK_KEY = "prolora.mark"
"""The entry of a safetensors header that holds the mark."""
CONFIG_KEY = "prolora.config"
"""The entry of the weights' header in a PEFT folder that holds the digest of its configuration."""
WRITTEN_BY = "written_by"
"""The entry of a JSON object that holds it."""
Kind = Literal["LoRA", "report", "card", "picture", "map", "state", "plan"]
"""What a file is: it is replaced by its like only."""

_ZEROS = b"0" * 64
_MARK = re.compile(rb"prolora:(\w{1,16}):sha256:([0-9a-f]{64})")
# Bytes of a file in which its mark is looked for: no header of a safetensors file is longer.
_HEAD_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20
# How many marks are tried of those that a file holds: others than its own are quoted in it.
_MOST_MARKS = 8
_PNG = b"\x89PNG\r\n\x1a\n"
# Length, type and checksum of the empty chunk that ends a PNG file.
_PNG_END = 12
_TEXT = b"tEXtprolora\0"


def make_mark(kind: Kind) -> str:
    """A mark without its digest: it is put into a file wherever that kind of file can hold it."""
    return f"prolora:{kind}:sha256:{'0' * 64}"


def sign(data: bytes) -> bytes:
    """Fills in the first mark that has no digest; a text without one comes back as it is."""
    for match in _MARK.finditer(data):
        if match[2] == _ZEROS:
            digest = hash_parts([data]).encode()
            return data[: match.start(2)] + digest + data[match.end(2) :]
    return data


def mark_json(kind: Kind, *records: Mapping[str, Any]) -> str:
    """One JSON object, or a list of several; the first has the mark, which `sign` fills in."""
    marked = [{WRITTEN_BY: make_mark(kind), **records[0]}, *records[1:]]
    return json.dumps(marked[0] if len(marked) == 1 else marked, indent=1) + "\n"


def sign_png(data: bytes) -> bytes:
    """A PNG file with a mark in a chunk of text at its end, which viewers ignore."""
    text = _TEXT + make_mark("picture").encode()
    start, end = data[:-_PNG_END], data[-_PNG_END:]
    # A checksum of zeros, which the digest is of: it depends on the digest.
    length = (len(text) - 4).to_bytes(4, "big")
    digest = hash_parts([start, length, text, bytes(4), end])
    text = text.replace(_ZEROS, digest.encode())
    return start + length + text + zlib.crc32(text).to_bytes(4, "big") + end


def is_own(path: Path, kind: Kind) -> bool:
    """Whether prolora wrote a file, as one of its kind, and nobody has changed it since.

    A file without such a mark in its first 32 MiB is read no further.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return is_signed(file, kind)


def is_signed(file: BinaryIO, kind: Kind) -> bool:
    """Whether a file has a mark of a kind whose digest is its own; arguments as `is_own`."""
    head = file.read(_HEAD_BYTES)
    marks = [m for m in _MARK.finditer(head) if m[1] == kind.encode()][:_MOST_MARKS]
    marks = [m for m in marks if not head.startswith(_PNG) or _has_checksum(head, m)]
    digests = {mark[2]: hashlib.sha256(_blank(head, mark)) for mark in reversed(marks)}
    while digests and (block := file.read(_BLOCK_BYTES)):
        for digest in digests.values():
            digest.update(block)
    return any(digest.hexdigest().encode() == found for found, digest in digests.items())


def _was_cut_off(path: Path) -> bool:
    """Whether a safetensors file with the mark of a LoRA is shorter than its header says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    stop = 8 + int.from_bytes(head[:8], "little")
    if not any(mark[1] == b"LoRA" for mark in _MARK.finditer(head[:stop])):
        return False
    if size < stop:
        return True
    try:
        entries = json.loads(head[8:stop])
        ends = [x["data_offsets"][1] for k, x in entries.items() if k != "__metadata__"]
        return bool(size < stop + max(ends, default=0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return False


def check_replaceable(path: str | os.PathLike[str], kind: Kind, overwrite: bool = False) -> None:
    """Refuses an output path that holds anything but a file of its kind that prolora wrote.

    An empty file, as `mktemp` makes one, holds nothing that could be lost; nor does a LoRA of
    prolora that was cut off, which no program reads.

    Args:
        path: the output; a symbolic link stands for what it points to.
        kind: of the output.
        overwrite: replace whatever is there.

    Raises:
        ForeignFile: it holds something else, or a file that was changed since.
        OutputError: what is there cannot be read.
    """
    # `check_writable` refuses what is there and no file.
    if overwrite or not os.path.isfile(path):
        return
    try:
        if os.path.getsize(path) == 0 or is_own(Path(path), kind):
            return
        if kind == "LoRA" and _was_cut_off(Path(path)):
            return
    except OSError as error:
        raise output_error(path, error, "exists and cannot be read") from error
    raise foreign_file(path, kind)


def foreign_file(path: str | os.PathLike[str], kind: str) -> ForeignFile:
    """The error of an output path that holds somebody's file."""
    return ForeignFile(
        f"{os.fspath(path)}: exists and is not a {kind} as prolora wrote it, so it is not "
        "replaced; choose another name, or allow it with `overwrite=True`"
    )


def _has_checksum(head: bytes, mark: re.Match[bytes]) -> bool:
    """Whether the checksum of a mark's chunk, which the digest leaves out, is right."""
    chunk = head[mark.start() - len(_TEXT) : mark.end()]
    return head[mark.end() : mark.end() + 4] == zlib.crc32(chunk).to_bytes(4, "big")


def _blank(head: bytes, mark: re.Match[bytes]) -> bytes:
    """The beginning of a file with zeros for the digits of a mark.

    In a PNG file also for the checksum behind it.
    """
    start, stop = mark.span(2)
    sum_bytes = 4 if head.startswith(_PNG) else 0
    return head[:start] + _ZEROS + bytes(sum_bytes) + head[stop + sum_bytes :]
