"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OutputError, UnsupportedFormat
from .safetensors_file import DTYPES, SafetensorsFile, StrPath

Tensors = Mapping[str, Tensor]
Metadata = Mapping[str, str]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_writable(path: StrPath, inputs: Iterable[StrPath] = ()) -> None:
    """Refuses an output path before any work is done for it.

    Args:
        path: the file that will be written; a symbolic link stands for what it points to.
        inputs: files or folders that must not be overwritten.

    Raises:
        OutputError: the folder is missing or cannot be written, `path` is something other than a
            file, or it is one of `inputs` (also through a symbolic or hard link).
    """
    try:
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise OutputError(f"{path}: the folder {target.parent} does not exist")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: the folder {target.parent} cannot be written")
        try:
            mode = os.lstat(target).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            raise OutputError(f"{path}: is a folder; name a file in it")
        if not stat.S_ISREG(mode):
            raise OutputError(f"{path}: is not a regular file")
        if not os.access(target, os.W_OK):
            raise OutputError(f"{path}: exists and is write-protected")
        for source in map(Path, inputs):
            folder = Path(os.path.realpath(source)) if source.is_dir() else None
            if (folder and folder in target.parents) or (
                source.exists() and os.path.samefile(source, target)
            ):
                raise OutputError(f"{path}: would overwrite the input {source}")
    except (OSError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path}: cannot be written: {error}") from error


def write_safetensors(path: StrPath, tensors: Tensors, metadata: Metadata) -> None:
    """Writes a file that was read back and compared bit by bit before it got its name.

    Args:
        path: the file; replaced if it exists, untouched if anything fails.
        tensors: name -> tensor of any device and layout.
        metadata: the header's metadata.

    Raises:
        OutputError: it cannot be written, or reads back differently.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _replace_file(path) as temporary:
        dump_safetensors(temporary, plain, metadata)
        _verify_safetensors(SafetensorsFile(temporary), plain, metadata, path)


def dump_safetensors(path: Path, tensors: Tensors, metadata: Metadata) -> None:
    """Writes a file without any safety; the same bytes for the same content.

    Not by the safetensors library: version 0.8 shuffles the metadata from run to run, so that one
    transfer done twice would give two different files.
    """
    raw, ordered = _lay_out_file(tensors, metadata)
    with open(path, "wb") as file:
        file.write(raw)
        for tensor in ordered:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def safetensors_size(tensors: Tensors, metadata: Metadata) -> int:
    """Bytes of the file that `dump_safetensors` makes; the tensors may be on the meta device."""
    raw, ordered = _lay_out_file(tensors, metadata)
    return len(raw) + sum(tensor.numel() * tensor.dtype.itemsize for tensor in ordered)


def _lay_out_file(tensors: Tensors, metadata: Metadata) -> tuple[bytes, list[Tensor]]:
    """What a file begins with, and the tensors in the order in which it goes on."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide dtypes first keeps every tensor aligned for readers that map the file.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.numel() * tensor.dtype.itemsize
        dtype = _NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, [tensor for _, tensor in ordered]


def write_text_atomically(path: StrPath, text: str) -> None:
    """Writes `text` as UTF-8; an existing file stays as it is if anything fails.

    Raises:
        OutputError: it cannot be written.
    """
    with _replace_file(path) as temporary:
        temporary.write_bytes(text.encode())


def _verify_safetensors(
    file: SafetensorsFile, tensors: Tensors, metadata: Metadata, path: StrPath
) -> None:
    """Compares what is on disk with what was meant, bit by bit: NaN equals NaN, -0 is not 0."""
    if file.tensors.keys() != tensors.keys() or file.metadata != metadata:
        raise OutputError(f"{path}: the file reads back with other names or metadata")
    for name, tensor in tensors.items():
        back = file.read(name)
        same = back.dtype == tensor.dtype and back.shape == tensor.shape
        back_bytes, bytes_ = (t.reshape(-1).view(torch.uint8) for t in (back, tensor))
        if not same or not torch.equal(back_bytes, bytes_):
            raise OutputError(f"{path}: {name} reads back differently; the disk may be faulty")


@contextmanager
def _replace_file(path: StrPath) -> Iterator[Path]:
    """A new file beside `path` that takes its name on success and vanishes on any failure."""
    check_writable(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".prolora-{secrets.token_hex(8)}.tmp")
    try:
        # Not `tempfile`, whose files are private to the user.
        temporary.touch(0o666, exist_ok=False)
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the name must never be on the disk before the data
        os.replace(temporary, target)
    except (OSError, UnsupportedFormat) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
