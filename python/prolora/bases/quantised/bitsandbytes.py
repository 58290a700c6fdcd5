"""bitsandbytes: nf4 and fp4 with a scale for each block, and int8 with one for each row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights import Weight
from .codes import FLOATS, look_up, unpack_nibbles
from .parts import CheckpointParts, read_sizes
from .weight import QuantisedWeight, scale_rows

_STATE = ".quant_state.bitsandbytes__"
# The quantiles of a normal distribution (QLoRA, appendix E), and the four bits of bitsandbytes:
# a sign and {0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4}.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
_TABLES = {"nf4": _NF4, "fp4": (*_FP4, *(-x for x in _FP4))}
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FP4_SLACK = 1e-6
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class FourBitWeight(QuantisedWeight):
    """Codes of four bits, two a byte; blocks in reading order share a scale."""

    table: tuple[float, ...] = ()  # the numbers that the codes stand for
    block: int = 64  # how many share a scale
    # (block, offset) of the scales where these are quantised, too
    nested: tuple[int, float] | None = None

    def load_scales(self) -> tuple[Tensor, ...]:
        """Reads the largest absolute value of each block."""
        if self.nested is None:
            return (self.read_scale(self.scales[0]).flatten(),)
        size, offset = self.nested
        codes = self.scales[0].read().flatten()
        largest, table = (self.read_scale(part).flatten() for part in self.scales[1:3])
        blocks = torch.arange(len(codes)) // size
        return (look_up(codes, table).mul_(largest[blocks]).add_(offset),)

    def decode(self, start: int, stop: int, scales: tuple[Tensor, ...]) -> Tensor:
        """Decodes whole blocks and cuts off what lies outside the rows."""
        columns = math.prod(self.shape[1:])
        first, last = start * columns, stop * columns
        one, end = first // self.block, -(-last // self.block)
        begin, count = one * self.block, math.prod(self.shape)
        packed = self.stored.read_rows(begin // 2, -(-min(end * self.block, count) // 2))
        codes = unpack_nibbles(packed.flatten(), high_first=True)
        numbers = look_up(codes, torch.tensor(self.table))
        missing = (end - one) * self.block - len(numbers)  # the last block may be shorter
        numbers = torch.nn.functional.pad(numbers, (0, missing)).view(-1, self.block)
        numbers = numbers.mul_(scales[0][one:end, None]).flatten()
        return numbers[first - begin : last - begin]


def join_bitsandbytes(parts: CheckpointParts) -> None:
    """Makes one weight of each that bitsandbytes quantised.

    Raises:
        UnsupportedFormat: parts that are missing or do not fit together.
    """
    for key in [key for key in parts if _STATE in key]:
        name, _, kind = key.partition(_STATE)
        if kind in _TABLES:
            _join_four_bits(parts, name, kind, parts.read_note(key))
    for key in [key for key in parts if key.endswith(".SCB")]:
        module = key.removesuffix(".SCB")
        name, layout = f"{module}.weight", f"{module}.weight_format"
        stored = parts.check_codes(name, (torch.int8,), 2)
        scale = parts.check(key, FLOATS, (stored.shape[0],))
        if (order := parts.get(layout)) is not None and bool(order.read().any()):
            raise parts.refuse(
                f"{name} is int8 in an order for one kind of graphics card ({layout}); save the "
                "model with a newer bitsandbytes, or use the fp16 or bf16 version"
            )
        kind = "bitsandbytes int8"
        parts.join([name, key, layout], name, scale_rows(kind, stored, scale, 127.0))


def _join_four_bits(parts: CheckpointParts, name: str, kind: str, note: dict[str, object]) -> None:
    """Joins one weight of nf4 or fp4, its note already read."""
    stored = parts.need(name, "its quant_state")
    shape, block = read_sizes(note.get("shape")), note.get("blocksize")
    if shape is None or not isinstance(block, int) or block not in _BLOCK_SIZES:
        raise parts.refuse(
            f"{name}: its quant_state says shape {note.get('shape')!r:.60} and blocks of "
            f"{block!r:.40}; the checkpoint is damaged"
        )
    count = math.prod(shape)
    stored = parts.check(name, (torch.uint8,), (-(-count // 2),))
    blocks, nested = -(-count // block), None
    part = f"{name}.".__add__
    if part("nested_absmax") in parts.weights:
        size, offset = note.get("nested_blocksize"), note.get("nested_offset")
        finite = isinstance(offset, float | int) and math.isfinite(offset)
        if type(size) is not int or size < 1 or not finite:
            raise parts.refuse(f"{name}: nested blocks of {size!r:.40} with offset {offset!r:.40}")
        assert isinstance(offset, float | int)
        nested = size, float(offset)
        scales: tuple[Weight, ...] = (
            parts.check(part("absmax"), (torch.uint8,), (blocks,)),
            parts.check(part("nested_absmax"), FLOATS, (-(-blocks // size),)),
            parts.check(part("nested_quant_map"), FLOATS, (256,)),
        )
    else:
        scales = (parts.check(part("absmax"), FLOATS, (blocks,)),)
    _check_table(parts, part("quant_map"), kind)
    weight = FourBitWeight(
        f"bitsandbytes {kind}", stored, scales, shape, _TABLES[kind], block, nested
    )
    parts.join([name, part(_STATE[1:] + kind), *map(part, _PARTS)], name, weight)


def _check_table(parts: CheckpointParts, key: str, kind: str) -> None:
    """Refuses a table other than the one of its kind, which bitsandbytes reads by."""
    table = parts.check(key, FLOATS, (16,)).read().to(torch.float32).flatten()
    if not bool(((table - torch.tensor(_TABLES[kind])).abs() <= _FP4_SLACK).all()):
        raise parts.refuse(f"{key} is not the table of {kind}; the checkpoint is damaged")
