"""Files of the cache: written whole or not at all, by any number of processes at once.

Nothing here is worth more than the time it takes to compute it again. So a file is not forced to
the disk before it gets its name, as the results of a transfer are: a checksum in every file tells,
after a crash of the machine, those that are not whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ...files.atomic import replace_file


def publish_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path`, then gives it that name.

    Raises:
        OSError: the disk is full, the folder is not writable, …; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path, durable=False) as temporary:
        write(temporary)


def compute_checksum(tensors: Iterable[Tensor]) -> int:
    """Computes CRC-32 of all bytes: against accidents, not against forgery.

    The tensors have any dtype, and are contiguous and on the CPU.
    """
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data, total)
    return total
