"""optimum-quanto: int8 and float8 with a scale for each row, and 2 or 4 bits in groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import FLOATS
from .parts import CheckpointParts
from .weight import QuantisedWeight, scale_rows

_CODES = ".weight._data"
_PACKED = ".weight._data._data"
_OF_ACTIVATIONS = ("input_scale", "output_scale")
_BYTES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class PackedGroupWeight(QuantisedWeight):
    """Groups of codes [k, size], a byte holding one code of each of 2 or 4 ranges of groups.

    W = q · scale - shift where the shift is a float, and (q - shift) · scale where it is not.

    Attributes:
        bits: of a code.
    """

    bits: int = 4

    def load_scales(self) -> tuple[Tensor, ...]:
        """Scale and shift [k, 1]."""
        scale, shift = (self.read_scale(part).reshape(-1, 1) for part in self.scales)
        return scale, shift if self.scales[1].dtype.is_floating_point else shift * scale

    def decode(self, start: int, stop: int, scales: tuple[Tensor, ...]) -> Tensor:
        """Every group that the rows touch; what lies outside of them is cut off."""
        packed, size = self.stored.shape
        columns = math.prod(self.shape[1:])
        first, last = start * columns // size, -(-stop * columns // size)
        pieces = []
        for place in range(8 // self.bits):  # the groups [place · packed, (place + 1) · packed)
            one, end = (min(max(n - place * packed, 0), packed) for n in (first, last))
            if one < end:
                codes = self.stored.read_rows(one, end) >> (self.bits * place)
                pieces.append((codes & (2**self.bits - 1)).to(torch.float32))
        scale, shift = (part[first:last] for part in scales)
        numbers = torch.cat(pieces).mul_(scale).sub_(shift).flatten()
        return numbers[start * columns - first * size : stop * columns - first * size]


def join_quanto(parts: CheckpointParts) -> None:
    """Makes one weight of each that quanto quantised.

    Raises:
        UnsupportedFormat: parts that are missing or do not fit together.
    """
    modules = set()
    for key in list(parts):
        if key.endswith(_CODES):
            modules.add(module := key.removesuffix(_CODES))
            _join_bytes(parts, module)
        elif key.endswith(_PACKED):
            modules.add(module := key.removesuffix(_PACKED))
            _join_groups(parts, module)
    for module in modules:
        for name in _OF_ACTIVATIONS:
            if parts.get(f"{module}.{name}") is not None:
                parts.drop(f"{module}.{name}")


def _join_bytes(parts: CheckpointParts, module: str) -> None:
    """int8 or float8 with a scale for each row, or one for all."""
    key, name = module + _CODES, f"{module}.weight"
    stored, scale_key = parts.check_codes(key, _BYTES), f"{name}._scale"
    single = math.prod(parts.need(scale_key, key).shape) == 1
    scale = parts.check(scale_key, FLOATS, () if single else (stored.shape[0],))
    kind = "quanto " + ("qint8" if stored.dtype == torch.int8 else "qfloat8")
    parts.join([key, scale_key], name, scale_rows(kind, stored, scale))


def _join_groups(parts: CheckpointParts, module: str) -> None:
    """Two or four bits: the number of groups is that of scales, and the rows are those of the bias.

    Without a bias the rows are those of the family's published sizes.

    Raises:
        UnsupportedFormat: nothing tells how many rows there are.
    """
    key, name = module + _PACKED, f"{module}.weight"
    stored = parts.check_codes(key, (torch.uint8,), 2)
    keys = [f"{name}._scale", f"{name}._shift"]
    groups = math.prod(parts.need(keys[0], key).shape)
    bits = next((b for b in (4, 2) if -(-groups * b // 8) == stored.shape[0]), None)
    if bits is None:
        raise parts.refuse(
            f"{keys[0]} has {groups} scales for {stored.shape[0]} rows of bytes, neither 2 nor 4 "
            "of each; download it again"
        )
    parts.check(keys[0], FLOATS, (groups,))
    shift = parts.check(keys[1], (*FLOATS, torch.int8, torch.uint8), (groups,))
    numbers = groups * stored.shape[1]
    rows = parts.count_outputs(module)
    if rows is None and (published := parts.guess_shape(module, (numbers,))) is not None:
        rows = published[0]
    if rows is None or numbers % rows:
        raise parts.refuse(
            f"{name} is quantised by quanto in {groups} groups of {stored.shape[1]}, and nothing "
            "in the file says how many rows it has; use the fp16 or bf16 version"
        )
    shape, scales = (rows, numbers // rows), (parts.weights[keys[0]], shift)
    weight = PackedGroupWeight(f"quanto qint{bits}", stored, scales, shape, bits)
    parts.join([key, *keys], name, weight)
