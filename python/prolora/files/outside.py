"""What comes from outside: regular files of a bounded size, and fields of the kinds they claim."""

from __future__ import annotations

import math
import os
import stat
import types
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from io import BufferedReader
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..errors import UnsupportedFormat, input_error

Kind = TypeVar("Kind")

# Beyond what any count, size or time of ours can be.
_LARGEST = 2**63


MOST_TEXT = 64 << 20
"""Bytes of a list or of prompts: a million lines."""


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> BufferedReader:
    """Opens a file for reading; refuses pipes and devices, which would block.

    Args:
        path: the file; a link stands for its destination.
        limit: most bytes; None sets no bound.

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


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """Reads the text of a file that people write by hand: a list, prompts.

    Raises:
        UnsupportedFormat: as `open_regular`, or it is no text.
    """
    with open_regular(path, MOST_TEXT) as file:
        content = file.read(MOST_TEXT)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise input_error(path, error) from error


_BINARY = getattr(os, "O_BINARY", 0)


def read_fields(kind: type[Kind], content: object, where: str, **given: object) -> Kind:
    """Reads a dataclass from a JSON object and checks its entries' types.

    Args:
        kind: the dataclass; its fields are texts, numbers, choices, and mappings of texts.
        content: what JSON gave.
        where: its name in messages.
        **given: fields that have been read already.

    Raises:
        UnsupportedFormat: it is no object, lacks a field, has an unknown one, or one of another
            kind.
    """
    if not isinstance(content, Mapping):
        raise UnsupportedFormat(f"{where}: is damaged: an object is needed, not {content!r:.40}")
    hints = _find_hints(cast(Hashable, kind))
    for name in content:
        if name not in hints or name in given:
            raise UnsupportedFormat(f"{where}: is damaged: {name!r:.40} is unknown")
    for field in fields(kind):  # type: ignore[arg-type]
        needed = field.default is MISSING and field.default_factory is MISSING
        if needed and field.name not in content and field.name not in given:
            raise UnsupportedFormat(f"{where}: is damaged: {field.name} is missing")
    for name, value in content.items():
        if not _is_of(value, hints[name]):
            raise UnsupportedFormat(f"{where}: is damaged: {name} cannot be {value!r:.40}")
    return kind(**content, **given)


@lru_cache
def _find_hints(kind: Hashable) -> dict[str, Any]:
    """Returns the types of a dataclass's fields.

    Evaluating them takes longer than reading a line.
    """
    return get_type_hints(kind)


def _is_of(value: object, hint: Any) -> bool:
    """Returns whether a field of this type may hold a value."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (Union, types.UnionType):
        return any(_is_of(value, one) for one in inner)
    if hint is type(None):
        return value is None
    if hint is str:
        return isinstance(value, str)
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return type(value) is int and abs(value) < _LARGEST
    if hint is float:
        return type(value) in (int, float) and _is_moderate(value)
    if origin is dict:
        key, part = inner
        return isinstance(value, dict) and all(
            _is_of(k, key) and _is_of(v, part) for k, v in value.items()
        )
    return hint is Any


def _is_moderate(number: Any) -> bool:
    return abs(number) < _LARGEST if isinstance(number, int) else math.isfinite(number)


def is_path_text(text: str) -> bool:
    """Returns whether the system takes a text as a path.

    Not an empty one, nor one with a null byte or half a character.
    """
    try:
        return b"\0" not in os.fsencode(text) and bool(text)
    except UnicodeEncodeError:
        return False
