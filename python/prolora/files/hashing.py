"""SHA-256 of texts, tensors and files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import input_error

_BLOCK_BYTES = 1 << 20


def hash_parts(parts: Iterable[str | bytes | memoryview | Tensor]) -> str:
    """Computes SHA-256, in hexadecimal, of some parts one after the other.

    Texts count as UTF-8; tensors of any device and layout as their bytes, without dtype and shape.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(view_bytes(part))
        else:
            digest.update(part.encode(errors="surrogatepass") if isinstance(part, str) else part)
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """Computes SHA-256 of a text as UTF-8, in hexadecimal."""
    return hash_parts([text])


def hash_file(path: Path, start: int = 0, size: int | None = None) -> str:
    """Computes SHA-256 of a file's bytes from `start` on, in hexadecimal.

    `size` is the most bytes; None for all that follow.
    """
    return hash_parts(read_blocks(path, start, size))


def read_blocks(path: Path, start: int = 0, size: int | None = None) -> Iterator[bytes]:
    """Yields the bytes of a file in pieces of 1 MiB, as `hash_file` takes them."""
    left = size
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while left is None or left > 0:
                block = file.read(_BLOCK_BYTES if left is None else min(left, _BLOCK_BYTES))
                if not block:
                    return
                left = None if left is None else left - len(block)
                yield block
    except OSError as error:
        raise input_error(path, error) from error


def hash_tensors(keys: Iterable[str], read: Callable[[str], Tensor], beside: str = "") -> str:
    """Computes SHA-256 of tensors with names, dtypes and shapes, and of a text beside them."""
    pairs = ((key, read(key)) for key in sorted(keys))
    parts = (part for k, x in pairs for part in (f"{k} {x.dtype} {tuple(x.shape)} ", x))
    return hash_parts(chain(parts, [beside]))


def view_bytes(tensor: Tensor) -> Any:
    """Returns a tensor's bytes as a buffer, copied only from another device or layout."""
    return flatten_bytes(tensor).numpy().data


def flatten_bytes(tensor: Tensor) -> Tensor:
    """Returns a tensor's bytes as a tensor [n] on the CPU."""
    values = tensor.detach().cpu().contiguous()
    # An expanded single value counts as contiguous, and has the stride 0.
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8)
