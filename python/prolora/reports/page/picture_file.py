"""Pixels as PNG files, without a library for images."""

from __future__ import annotations

import struct
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

_UP = 2  # the filter of a row: its difference to the row above


def write_png(pixels: Tensor, most: int = 256) -> bytes:
    """Writes an image [3, h, w] from 0 to 1 as a PNG file.

    `most` is the height and width that it is shrunk to, where it is larger.
    """
    image = pixels.detach().to("cpu", torch.float32)[None]
    longest = max(image.shape[-2:])
    if longest > most:
        size = [max(round(side * most / longest), 1) for side in image.shape[-2:]]
        image = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
    bytes_ = (image[0].clamp(0, 1) * 255).round().to(torch.int16).permute(1, 2, 0)
    height, width, _ = bytes_.shape
    above = torch.cat([torch.zeros_like(bytes_[:1]), bytes_[:-1]])
    rows = ((bytes_ - above) % 256).to(torch.uint8).reshape(height, -1)
    filtered = torch.cat([torch.full((height, 1), _UP, dtype=torch.uint8), rows], 1)
    data = zlib.compress(filtered.contiguous().numpy().tobytes(), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, red green blue
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_write_chunk(*chunk) for chunk in chunks)


def _write_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
