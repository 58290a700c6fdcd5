"""Safetensors files with one thing wrong with them: cut, a bit turned over, another header."""

import json
import struct
from random import Random

VALUES = (None, [], {}, "x", "../x", 0, -1, True, 10**400, 1e999, [0], [-1], [2**62, 2], [0, 2**63])
DTYPES = ("F64", "F16", "BF16", "F8_E4M3", "I8", "U64", "BOOL", "F4")


def damage(data: bytes, random: Random) -> bytes:
    """A file that is mostly still one: half of the times its header says something else."""
    start = 8 + int.from_bytes(data[:8], "little")
    kind = random.choice(("cut", "flip", "number", "header", "header", "header"))
    if kind == "cut":
        return data[: random.randrange(len(data))]
    if kind == "flip":
        at = random.randrange(start if random.random() < 0.7 else len(data))
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    if kind == "number":
        at = random.randrange(start, max(start + 1, len(data) - 4))
        number = random.choice((float("nan"), float("inf"), 3e38, 1e-45))
        return data[:at] + struct.pack("<f", number) + data[at + 4 :]
    table = json.loads(data[8:start])
    change_header(table, random)
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


def change_header(table: dict, random: Random) -> None:
    """Renames, drops or swaps tensors, or changes the shape, type or place of one."""
    keys = [key for key in table if key != "__metadata__"]
    key, other = random.choice(keys), random.choice(keys)
    how = random.choice(("renamed", "gone", "swapped", "shape", "dtype", "value", "metadata"))
    if how == "renamed":
        stem, _, suffix = key.rpartition(".")
        names = (key.upper(), f"{key}.{suffix}", stem, "x" * 5000, key.replace("0", "9" * 400))
        table[random.choice((*names, key.replace("_", "."), f"{stem}.alpha"))] = table.pop(key)
    elif how == "gone":
        del table[key]
    elif how == "swapped":
        table[key], table[other] = table[other], table[key]
    elif how == "shape":
        shape = table[key]["shape"]
        table[key]["shape"] = random.choice((shape[::-1], [*shape, 1], shape[:-1], [1, *shape]))
    elif how == "dtype":
        table[key]["dtype"] = random.choice(DTYPES)
    elif how == "value":
        table[key][random.choice(("shape", "dtype", "data_offsets"))] = random.choice(VALUES)
    else:
        table["__metadata__"] = random.choice(({"ss_tag_frequency": "[" * 3000}, {"a": 1}, [], "x"))
