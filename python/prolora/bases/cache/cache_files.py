"""Files of the cache: written whole or not at all, by any number of processes at once.

Nothing here is worth more than the time it takes to compute it again. So a file is not forced to
the disk before it gets its name, as the results of a transfer are: a checksum in every file tells,
after a crash of the machine, those that are not whole.
"""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def publish_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path` that then takes its name, replacing what has it.

    Raises:
        OSError: the disk is full, the folder is not writable, …; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process that is killed leaves this file behind; it is never read, only removed.
    temporary = path.with_name(f".prolora-{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def compute_checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of all bytes, one tensor after the other: against accidents, not against forgery.

    Args:
        tensors: of any dtype, contiguous, on the CPU.
    """
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data, total)
    return total
