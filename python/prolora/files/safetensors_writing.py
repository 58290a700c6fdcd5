"""Safetensors files: the same bytes for the same content, compared with what reads back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OutputError
from .dtypes import name_dtype
from .hashing import flatten_bytes, view_bytes
from .safetensors_file import SafetensorsFile, StrPath
from .store import put, replace_surrogates

Tensors = Mapping[str, Tensor]
Metadata = Mapping[str, str]


def write_safetensors(
    path: StrPath, tensors: Tensors, metadata: Metadata, *, overwrite: bool = False
) -> None:
    """Writes a file, reads it back and compares it bit by bit before naming it.

    Raises:
        OutputError: it cannot be written, or reads back differently.
    """
    put(path, lambda new: fill_safetensors(new, tensors, metadata, path), overwrite=overwrite)


def fill_safetensors(path: Path, tensors: Tensors, metadata: Metadata, where: StrPath) -> None:
    """Fills a file, called `where` in messages, and compares it bit by bit.

    Raises:
        OutputError: it reads back differently.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {key: replace_surrogates(value) for key, value in metadata.items()}
    dump_safetensors(path, plain, metadata)
    with closing(SafetensorsFile(path, keep_open=True)) as written:
        _verify_safetensors(written, plain, metadata, where)


def replace_tensor(path: Path, start: int, name: str, tensor: Tensor) -> None:
    """Replaces the bytes of one tensor from byte `start` on, and reads them back."""
    raw = flatten_bytes(tensor)
    back = torch.empty_like(raw)
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(view_bytes(raw))
        file.seek(start)
        if file.readinto(view_bytes(back)) != len(raw) or not torch.equal(back, raw):
            raise OutputError(f"{name} reads back differently; the disk may be faulty")


def dump_safetensors(path: Path, tensors: Tensors, metadata: Metadata) -> None:
    """Writes a file without any safety; the same bytes for the same content.

    Not by the safetensors library: version 0.8 shuffles the metadata from run to run, so that one
    transfer done twice would give two different files.
    """
    stream_safetensors(path, tensors, metadata, tensors.__getitem__)


def stream_safetensors(
    path: Path, outline: Tensors, metadata: Metadata, read: Callable[[str], Tensor]
) -> None:
    """Writes tensors one at a time; `read` gives those that the outline names."""
    # Wide dtypes first: every tensor stays aligned for readers that map files.
    ordered = dict(sorted(outline.items(), key=lambda item: -item[1].dtype.itemsize))
    with open(path, "wb") as file:
        file.write(encode_header(ordered, metadata))
        for name in ordered:
            file.write(view_bytes(read(name)))


def encode_header(tensors: Tensors, metadata: Metadata) -> bytes:
    """Encodes the beginning of a safetensors file: header length and header.

    `tensors` come in the order in which their bytes follow, on any device; empty metadata is left
    out.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.dtype.itemsize
        dtype = name_dtype(tensor.dtype)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _verify_safetensors(
    file: SafetensorsFile, tensors: Tensors, metadata: Metadata, where: StrPath
) -> None:
    """Compares what is on disk with what was meant, bit by bit: NaN equals NaN, -0 is not 0."""
    if file.tensors.keys() != tensors.keys() or file.metadata != metadata:
        raise OutputError(f"{where}: the file reads back with other names or metadata")
    for name, tensor in tensors.items():
        back = file.read(name)
        same = back.dtype == tensor.dtype and back.shape == tensor.shape
        if not same or not torch.equal(flatten_bytes(back), flatten_bytes(tensor)):
            raise OutputError(f"{where}: {name} reads back differently; the disk may be faulty")
