"""What can happen to a file: cut off, bits turned over, a value that is another.

The outcome must be a refusal that says why, or the result of the undamaged input, or a result whose
report says what is missing. A file that stays valid is another input: what LoRAs, PEFT folders and
maps then say is worked out without prolora (truths.py), and the result must be that. Only those
bytes are flipped by which a file says what it has: no format has a checksum of its weights.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from sandbox import Box, Row, Run, Words
from truths import list_differences, read_results

from prolora.cli.exits import ExitCode

REFUSALS = (ExitCode.REFUSED, ExitCode.NOT_FOR_IT)

EXTREMES = (0, 1, 2**16, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
NO_PLACE = "/dev/null/elsewhere"  # an absolute path at which nobody can write
VALUES: tuple[Any, ...] = (None, [], {}, [[[]]], {"a": {"b": None}}, True, 0, -1, 1e999, 10**400)
VALUES += ("", "x", "x" * 5000, "../../elsewhere", NO_PLACE, "\x1b[31m\n")


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


def spoil(data: bytes, random: Random, header: int) -> tuple[bytes, str]:
    """A number among the weights that is none: what no weight of a model is."""
    at = header + 4 * random.randrange((len(data) - header) // 4)
    value = random.choice((float("nan"), float("inf"), -float("inf")))
    return data[:at] + struct.pack("<f", value) + data[at + 4 :], f"bytes {at}: {value}"


def add(data: bytes, random: Random, header: int) -> tuple[bytes, str]:
    """A tensor that nobody knows, beside those of an update: it may be part of what that means."""
    table = json.loads(data[8:header])
    stem = random.choice([name for name in table if "lora_" in name and "." in name])
    stem = stem.partition(".lora_")[0].partition(".alpha")[0]
    word = random.choice(("gate", "magnitudes", "lora_extra.weight", "scale_2", "lora_C.weight"))
    end, shape = len(data) - header, random.choice(([], [1], [24], [24, 1]))
    size = 4 * (shape[0] if shape else 1)
    table[f"{stem}.{word}"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
    raw, how = json.dumps(table).encode(), f"{word} {shape} beside {stem}"
    return len(raw).to_bytes(8, "little") + raw + data[header:] + random.randbytes(size), how


KINDS = {"cut": cut, "flip": flip, "stamp": stamp, "edit": edit, "spoil": spoil, "add": add}


def safetensors_header(data: bytes) -> int:
    """Its length, and the eight bytes before it."""
    return 8 + int.from_bytes(data[:8], "little")


@dataclass(frozen=True)
class Damage:
    """An input, and the command that reads it."""

    prepare: Callable[[Box], None]  # fills the box
    command: Callable[[Box], Words]  # what is run once the input is damaged
    files: Callable[[Box], list[Path]]  # one of them is damaged
    runs: int = 60  # how many at scale 1
    kinds: str = "cut flip edit"
    header: Callable[[bytes], int] = len  # how many bytes say what the file has
    # whether the result is what the damaged input says, by another program
    is_expected: Callable[[Box], bool] = lambda _: False

    def __call__(self, box: Box, row: Row) -> None:
        """Damages a file again and again, each time from the beginning."""
        template = box.fill(self.prepare)
        box.must(*self.command(box))
        truth, stated = read_results(box.out), list_differences(box.out / "report.json")
        if not truth:
            raise RuntimeError(f"{row.case}: no result to compare with")
        for number in range(row.count(self.runs)):
            random = row.random(row.case, number)
            box.begin(template)
            path = random.choice(sorted(self.files(box)))
            data, kind = path.read_bytes(), random.choice(self.kinds.split())
            damaged, how = KINDS[kind](data, random, min(self.header(data), len(data)))
            if damaged == data:
                continue
            path.write_bytes(damaged)
            judge = partial(self.judge, box, truth, stated, read_results(box.out), kind)
            how = f"{number}: {path.relative_to(box.root)}: {kind}, {how}"
            box.attack(row, self.command(box), how, judge)

    def judge(
        self,
        box: Box,
        truth: dict[str, str],
        stated: set[str],
        kept: dict[str, str],
        kind: str,
        run: Run,
    ) -> list[str]:
        """The verdict on the results of a command that ended as it should."""
        found = read_results(box.out)
        said = list_differences(box.out / "report.json") - stated
        if run.code == ExitCode.INCOMPLETE:  # it wrote the rest, and says which updates stay behind
            return ["stated"] if said or "stay behind" in run.text else ["silent"]
        if kind == "add":
            return ["refused"] if run.code in REFUSALS else ["silent"]
        if run.code:
            # What was there before, and what other LoRAs became, may be there.
            wrong = {n for n, what in found.items() if what not in (truth.get(n), kept.get(n))}
            refused = "refused" if run.code in REFUSALS else f"exit code {run.code}"
            return ["silent" if wrong else refused]
        if found == truth or self.is_expected(box):
            return ["equal"]
        return ["stated" if said else "silent"]
