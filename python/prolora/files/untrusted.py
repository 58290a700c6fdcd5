"""What comes from outside: regular files of a bounded size."""

from __future__ import annotations

import codecs
import os
import stat
from io import BufferedReader
from typing import Any

from ..errors import UnsupportedFormat, input_error

MOST_TEXT = 64 << 20
"""Bytes of a list or of prompts: a million lines."""


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> BufferedReader:
    """Opens a file for reading; refuses pipes and devices, which would block.

    A link stands for its destination; `limit` is the most bytes.

    Raises:
        UnsupportedFormat: it is missing, cannot be read, is no file or too large.
    """
    where = os.fspath(path)
    try:
        # Without O_NONBLOCK a pipe would wait here for a writer.
        number = os.open(where, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except (OSError, ValueError) as error:
        raise input_error(where, error) from error
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode):
        os.close(number)
        raise UnsupportedFormat(f"{where}: is not a regular file; name a file")
    if limit is not None and status.st_size > limit:
        os.close(number)
        raise UnsupportedFormat(
            f"{where}: too large: {status.st_size} bytes, more than any real one of its kind"
        )
    return os.fdopen(number, "rb")


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads the text of a file that people write by hand: a list, prompts.

    UTF-8, or UTF-16 with a byte order mark, as PowerShell writes it.

    Raises:
        UnsupportedFormat: as `open_regular`, or it is no text.
    """
    with open_regular(path, MOST_TEXT) as file:
        content = file.read(MOST_TEXT)
    try:
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise input_error(path, error) from error


def load_pretrained(kind: Any, folder: str | os.PathLike[str], **options: Any) -> Any:
    """Loads a model or pipeline by its library: local safetensors, and no code of the folder."""
    if hasattr(kind, "download"):  # a pipeline, whose parts may name code
        options["trust_remote_code"] = False
    return kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options)


_BINARY = getattr(os, "O_BINARY", 0)
