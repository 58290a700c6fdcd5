"""Numbers behind codes of less than a byte, and tiled scales."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What scales are stored in."""

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The numbers of four bits with two for the exponent (OCP Microscaling Formats, 5.3.3)."""


def unpack_nibbles(packed: Tensor, *, high_first: bool) -> Tensor:
    """Unpacks bytes [..., n] to codes 0 to 15 [..., 2n]."""
    packed = packed.view(torch.uint8)
    low, high = packed & 15, packed >> 4
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)


def read_floats(codes: Tensor) -> Tensor:
    """Codes that are numbers as they stand."""
    return codes.to(torch.float32)


def read_signed(packed: Tensor) -> Tensor:
    """Unpacks two numbers -8 to 7 of a byte, in two's complement.

    The lower half comes first.
    """
    return (unpack_nibbles(packed, high_first=False) ^ 8).to(torch.float32).sub_(8)


def read_unsigned(packed: Tensor) -> Tensor:
    """Unpacks two numbers 0 to 15 of a byte, the lower half first."""
    return unpack_nibbles(packed, high_first=False).to(torch.float32)


def read_e2m1_swapped(packed: Tensor) -> Tensor:
    """Unpacks two floats of a byte, the upper half first."""
    return look_up(unpack_nibbles(packed, high_first=True), E2M1)


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """Maps codes to the entries of a table [k], in the codes' shape."""
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def unblock_scales(blocked: Tensor, rows: int, columns: int) -> Tensor:
    """Scales [rows, columns] out of the order in which matrix units of NVIDIA read them.

    Tiles of 128 × 4 follow each other row by row. Within one, the scale of row r and column c is
    the number (r mod 32)·16 + (r div 32)·4 + c (cuBLAS, "1D block scaling factors layout").
    """
    high, wide = -(-rows // 128), -(-columns // 4)
    tiles = blocked.reshape(high, wide, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(128 * high, 4 * wide)[:rows, :columns]


def count_blocked_scales(rows: int, columns: int) -> int:
    """Counts the numbers that `unblock_scales` takes: whole tiles."""
    return -(-rows // 128) * -(-columns // 4) * 512


def read_powers(codes: Tensor) -> Tensor:
    """Reads bytes e as 2^(e - 127), and 0 as 0: the exponents of float32."""
    return (codes.view(torch.uint8).to(torch.int32) << 23).view(torch.float32)


def rotate_back(weight: Tensor, size: int) -> Tensor:
    """Undoes a rotation of `size` columns of [m, n] by a Hadamard matrix.

    H is the Kronecker power of [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]/2,
    which is symmetric and its own inverse.
    """
    four = torch.full((4, 4), 0.5)
    four[range(4), range(3, -1, -1)] = -0.5
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    turned: Tensor = weight.unflatten(1, (-1, size)) @ matrix
    return turned.flatten(1)
