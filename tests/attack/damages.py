"""What can happen to a file: cut off, bits turned over, a value that is another."""

from __future__ import annotations

import json
from random import Random
from typing import Any

EXTREMES = (0, 1, 2**16, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None,
    [],
    {},
    "",
    "x",
    "../../elsewhere",
    "/dev/null/elsewhere",  # an absolute path at which nobody can write
    0,
    -1,
    1e999,
    True,
    10**400,
    "x" * 5000,
    [[[]]],
    {"a": {"b": None}},
    "\x1b[31m\n",
)


def cut(data: bytes, random: Random, header: int) -> tuple[bytes, str]:
    """Cut off, half of the times at the end of a line where the file has lines."""
    lines = [i + 1 for i, byte in enumerate(data[:-1]) if byte == 10] if len(data) < 1 << 16 else []
    if lines and random.random() < 0.5:
        at = random.choice(lines)
    else:
        at = random.randrange(header if random.random() < 0.4 else len(data))
    return data[:at], f"cut to {at} of {len(data)} bytes"


def flip(data: bytes, random: Random, header: int) -> tuple[bytes, str]:
    """One bit turned over, or a byte that is another, where the file says what it holds."""
    at, changed = random.randrange(header), bytearray(data)
    changed[at] = changed[at] ^ 1 << random.randrange(8) if random.random() < 0.7 else _byte(random)
    return bytes(changed), f"byte {at}: {data[at]:#04x} is {changed[at]:#04x}"


def _byte(random: Random) -> int:
    return random.choice(b'0123456789abcxyz"{}[],:. \0\xff')


def stamp(data: bytes, random: Random, header: int) -> tuple[bytes, str]:
    """Eight bytes that are an extreme number."""
    at, number = random.randrange(max(1, header - 8)), random.choice(EXTREMES)
    return data[:at] + number.to_bytes(8, "little") + data[at + 8 :], f"bytes {at}: {number}"


def edit(data: bytes, random: Random, header: int) -> tuple[bytes, str]:
    """One value of the file's JSON that is another: of its lines, its whole, or its header."""
    if data[8:9] == b"{" and data[:1] != b"{":
        length = int.from_bytes(data[:8], "little")
        text, how = edit_text(data[8 : 8 + length].decode(), random)
        raw = text.encode("utf-8", "surrogatepass")
        return len(raw).to_bytes(8, "little") + raw + data[8 + length :], how
    lines = data.decode().splitlines(keepends=True)
    if len(lines) > 1 and all(line.startswith("{") and line.endswith("}\n") for line in lines):
        at = random.choice([0, random.randrange(len(lines))])
        text, how = edit_text(lines[at], random)
        lines[at] = text + "\n"
        return "".join(lines).encode("utf-8", "surrogatepass"), f"line {at + 1}: {how}"
    text, how = edit_text(data.decode(), random)
    return text.encode("utf-8", "surrogatepass"), how


def edit_text(text: str, random: Random) -> tuple[str, str]:
    """One value exchanged, one key left out, renamed or told twice."""
    table = json.loads(text)
    places = list(_list_places(table))
    where, key = random.choice(places)
    kind = random.choice(("value", "value", "value", "gone", "renamed", "twice"))
    if kind == "value" or not isinstance(where, dict):
        before, where[key] = where[key], random.choice(VALUES)
        return json.dumps(table), f"{key}: {before!r:.60} is {where[key]!r:.60}"
    if kind == "gone":
        del where[key]
        return json.dumps(table), f"{key} is gone"
    if kind == "renamed":
        other = random.choice([f"{key}x", key[:-1], key.upper(), "", "../x", "x" * 5000])
        where[other] = where.pop(key)
        return json.dumps(table), f"{key} is called {other:.40}"
    where[(mark := f"{key}\0twice")] = random.choice(VALUES)
    return json.dumps(table).replace(json.dumps(mark), json.dumps(key)), f"{key} is there twice"


def _list_places(value: Any) -> Any:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _list_places(value[key])


KINDS = {"cut": cut, "flip": flip, "stamp": stamp, "edit": edit}
