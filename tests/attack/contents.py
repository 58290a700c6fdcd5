"""Files made to harm: `CONTENTS` are written under the name of every input in turn."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import mini
import torch
from inputs import kohya_stem
from sandbox import Box

Maker = Callable[[Path, Box], None]


class Runs:
    """What makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.canary, "w")


def raw(header: bytes | object, size: int = 0, length: int | None = None) -> Maker:
    """A safetensors file of a header, and a hole of that many bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def make(path: Path, _: Box) -> None:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text) if length is None else length) + text)
            file.truncate(8 + len(text) + size)

    return make


def text(content: str | bytes) -> Maker:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda path, _: path.write_bytes(data) and None


def link(aim: str) -> Maker:
    return lambda path, _: path.symlink_to(aim)


def link_to_others(name: str) -> Maker:
    """A link to what somebody else has; inside the box, since what is attacked may write there."""

    def make(path: Path, box: Box) -> None:
        others = box.root / "others"
        others.mkdir(exist_ok=True)
        (others / "notes.txt").write_text("somebody's\n")
        path.symlink_to(others / name)

    return make


def entry(shape: list[int], stop: int, dtype: str = "F32") -> dict[str, object]:
    """A tensor of a header, from the first byte on."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, stop]}


def write_zip_pickle(path: Path, box: Box) -> None:
    """As torch.save writes it."""
    torch.save({"weight": Runs(box.canary)}, path)


def write_zip_bomb(path: Path, _: Box) -> None:
    """A kilobyte that says it is a gigabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 26))


def write_socket(path: Path, _: Box) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its whole path may be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def write_sparse(path: Path, _: Box) -> None:
    """A hundred gigabytes of nothing."""
    with open(path, "wb") as file:
        file.truncate(100 << 30)


def write_gguf(tensors: int, keys: int, name: int) -> Maker:
    """A GGUF file that promises more than it has."""
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + struct.pack("<Q", name) + b"x" * 64
    return text(head)


KEY = kohya_stem(mini.BLOCK.format(0, "attn1.to_q"))
TWICE = f'{{"{KEY}.alpha":{json.dumps(entry([], 4))},"{KEY}.alpha":{json.dumps(entry([1], 4))}}}'
DEEP = 100_000
CONTENTS: dict[str, Maker] = {
    "pickle": lambda path, box: path.write_bytes(pickle.dumps(Runs(box.canary), 2)) and None,
    "pickle, latest": lambda path, box: path.write_bytes(pickle.dumps(Runs(box.canary))) and None,
    "torch.save": write_zip_pickle,
    "zip bomb": write_zip_bomb,
    "header of 2^62 bytes": raw(b"{}", length=1 << 62),
    "header of a terabyte": raw(b"{}", length=1 << 40),
    "header of brackets": raw(b'{"a":[' + b"[]," * (1 << 20) + b"0]}"),
    "deep header": raw(b'{"a":' * DEEP),
    "deep metadata": raw({"__metadata__": {"lora_adapter_metadata": "[" * DEEP}}),
    "deep JSON": text("[" * DEEP),
    "deep JSON, closed": text('{"a":' * DEEP + "1" + "}" * DEEP),
    "shape 2^62": raw({f"{KEY}.lora_up.weight": entry([1 << 62, 4], 96)}, 96),
    "shape -1": raw({f"{KEY}.lora_up.weight": entry([-1, 4], 96)}, 96),
    "shape 0": raw({f"{KEY}.lora_{n}.weight": entry([0, 0], 0) for n in ("up", "down")}),
    "no shape": raw({f"{KEY}.lora_{n}.weight": entry([], 4) for n in ("up", "down")}, 4),
    "offsets of a terabyte": raw({f"{KEY}.lora_up.weight": entry([1 << 20, 1 << 18], 1 << 40)}, 96),
    "key twice": raw(TWICE.encode(), 4),
    "30,000 tensors": raw({f"x{i}.lora_up.weight": entry([0], 0) for i in range(30_000)}),
    "number of 5,000 digits": text('{"r": ' + "9" * 5000 + ', "prolora_plan": 1}'),
    "NaN and Infinity": text('{"r": NaN, "lora_alpha": Infinity, "prolora_plan": 1e999}'),
    "half characters": text('{"\\ud800": "\\udfff", "prolora_plan": "\\ud800"}'),
    "UTF-16": text("{}".encode("utf-16")),
    "byte order mark": text("\ufeff{}"),
    "control characters": text('{"\\u001b[31m\\u0007": "\\u0000\\u009b2J", "prolora_plan": 1}'),
    "list": text("[1, 2, 3]"),
    "number": text("7"),
    "empty": text(b""),
    "zeros": text(b"\0" * 65536),
    "noise": lambda path, _: path.write_bytes(Random(0).randbytes(65536)) and None,
    "a line of 64 MB": lambda path, _: path.write_bytes(b"x" * (64 << 20)) and None,
    "web page": text("<html><script>alert(1)</script></html>"),
    "GGUF of 2^60 tensors": write_gguf(1 << 60, 0, 4),
    "GGUF of 2^60 keys": write_gguf(1, 1 << 60, 4),
    "GGUF, name of 2^60": write_gguf(1, 0, 1 << 60),
    "sparse, 100 GB": write_sparse,
    "folder": lambda path, _: path.mkdir(),
    "pipe": lambda path, _: os.mkfifo(path),
    "socket": write_socket,
    "link to itself": link("itself"),
    "link to nothing": link_to_others("nothing/at/all"),
    "link to /dev/zero": link("/dev/zero"),
    "link to /dev/full": link("/dev/full"),
    "link to somebody's file": link_to_others("notes.txt"),
    "link to a folder": link_to_others(""),
}


def make(content: str, path: Path, box: Box) -> None:
    """Puts a content in the place of a file."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if content == "link to itself":
        path.symlink_to(path.name)
    else:
        CONTENTS[content](path, box)
