"""Files that are written completely or not at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OutputError, UnsupportedFormat, output_error
from .atomic import remove_stale_temporaries, replace_file, replace_folder
from .dtypes import name_dtype
from .hashing import flatten_bytes, hash_parts, view_bytes
from .ownership import MARK_KEY, make_mark, sign
from .safetensors_file import SafetensorsFile, StrPath

Tensors = Mapping[str, Tensor]
Metadata = Mapping[str, str]


def check_writable(path: StrPath, inputs: Iterable[StrPath] = ()) -> None:
    """Refuses an output path before any work is done for it.

    Args:
        path: the file that will be written, in a folder that is made if it is missing; a symbolic
            link stands for what it points to.
        inputs: files or folders that must not be overwritten.

    Raises:
        OutputError: the folder cannot be made or written, `path` is something other than a file,
            or it is one of `inputs` (also through a symbolic or hard link).
    """
    try:
        target = Path(os.path.realpath(path))
        if os.path.islink(path) and not target.parent.is_dir():
            raise OutputError(f"{path}: is a link into a folder that does not exist: {target}")
        around = next(above for above in target.parents if os.path.lexists(above))
        if not around.is_dir():
            raise OutputError(f"{path}: {around} is a file, not a folder; choose another name")
        if not os.access(around, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: the folder {around} cannot be written")
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
        raise output_error(path, error) from error


def write_safetensors(path: StrPath, tensors: Tensors, metadata: Metadata) -> None:
    """Writes a file that was read back and compared bit by bit before it got its name.

    Args:
        path: the file; replaced if it exists, untouched if anything fails.
        tensors: name -> tensor of any device and layout.
        metadata: the header's metadata; its mark gets the digest.

    Raises:
        OutputError: it cannot be written, or reads back differently.
    """
    with replace_output(path) as temporary:
        fill_safetensors(temporary, tensors, metadata, path)


def fill_safetensors(path: Path, tensors: Tensors, metadata: Metadata, where: StrPath) -> None:
    """Writes a file that has its temporary name, and compares what reads back bit by bit.

    Args:
        path: the file, as `replace_output` gives it or in a folder of that.
        tensors: name -> tensor of any device and layout.
        metadata: the header's metadata; its mark gets the digest.
        where: what messages call it.

    Raises:
        OutputError: it reads back differently.
        OSError: it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {key: replace_surrogates(value) for key, value in metadata.items()}
    if MARK_KEY in metadata:
        metadata[MARK_KEY] = make_mark("LoRA")
        ordered = order_tensors(plain)
        parts = (encode_header(ordered, metadata), *map(view_bytes, ordered.values()))
        metadata[MARK_KEY] = metadata[MARK_KEY].replace("0" * 64, hash_parts(parts))
    dump_safetensors(path, plain, metadata)
    _verify_safetensors(SafetensorsFile(path), plain, metadata, where)


def dump_safetensors(path: Path, tensors: Tensors, metadata: Metadata) -> None:
    """Writes a file without any safety; the same bytes for the same content.

    Not by the safetensors library: version 0.8 shuffles the metadata from run to run, so that one
    transfer done twice would give two different files.
    """
    ordered = order_tensors(tensors)
    with open(path, "wb") as file:
        file.write(encode_header(ordered, metadata))
        for tensor in ordered.values():
            file.write(view_bytes(tensor))


def safetensors_size(tensors: Tensors, metadata: Metadata) -> int:
    """Bytes of the file that `dump_safetensors` makes; the tensors may be on the meta device."""
    ordered = order_tensors(tensors)
    data = sum(tensor.numel() * tensor.dtype.itemsize for tensor in ordered.values())
    return len(encode_header(ordered, metadata)) + data


def order_tensors(tensors: Tensors) -> Tensors:
    """Wide dtypes first, which keeps every tensor aligned for readers that map the file."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def encode_header(tensors: Tensors, metadata: Metadata) -> bytes:
    """What a safetensors file begins with: the length of its header, and the header.

    Args:
        tensors: name -> tensor, in the order in which their bytes follow; on any device.
        metadata: left out of the header if it is empty.
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


def write_text_atomically(path: StrPath, text: str) -> None:
    """Writes `text` as UTF-8, its mark filled in (see `ownership.sign`); whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_bytes_atomically(path, sign(replace_surrogates(text).encode()))


def write_bytes_atomically(path: StrPath, content: bytes) -> None:
    """Writes a file; an existing one stays as it is if anything fails.

    Raises:
        OutputError: it cannot be written.
    """
    with replace_output(path) as temporary:
        temporary.write_bytes(content)


def replace_surrogates(text: str) -> str:
    """The text with "?" for each byte of a file name that is not UTF-8: no file could hold it."""
    return text.encode("utf-8", "replace").decode()


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


@contextmanager
def replace_output(path: StrPath, *, folder: bool = False) -> Iterator[Path]:
    """A new file or folder that takes the name of an output once it is written and checked.

    Args:
        path: the output; a symbolic link stands for what it points to. A missing folder around it
            is made, and vanishes where the output is not written.
        folder: make a folder; one that has the name is replaced as a whole, and what it holds
            beside the new files is kept.

    Raises:
        OutputError: it cannot be written, or cannot be read back; what was there is untouched.
    """
    if not (folder and os.path.isdir(path)):
        check_writable(path)
    target = Path(os.path.realpath(path))
    try:
        with (
            _make_folder(target.parent),
            (replace_folder if folder else replace_file)(target) as temporary,
        ):
            yield temporary
    except UnsupportedFormat as error:
        raise OutputError(f"{path}: was written but cannot be read back: {error}") from error
    except OSError as error:
        raise output_error(path, error) from error


@contextmanager
def _make_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and those around it; on a failure those that are still empty vanish."""
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(folder)
    try:
        yield
    except BaseException:
        for made in missing:
            with suppress(OSError):
                made.rmdir()
        raise
