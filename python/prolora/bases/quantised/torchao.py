"""torchao: `<module>._weight_qdata` and what belongs to it, described in the header's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...files.jsontext import parse_json_object
from ..weights import Weight
from .codes import FLOATS, count_blocked_scales, read_e2m1, read_floats
from .comfy import TiledScaleWeight
from .parts import CheckpointParts, read_sizes
from .weight import ScaledWeight, UnreadableWeight

_LIST = "tensor_names"
_PARTS = ("qdata", "scale")
_ONE_BYTE = {
    "Int8Tensor": (torch.int8,),
    "IntxUnpackedToInt8Tensor": (torch.int8,),
    "Float8Tensor": (torch.float8_e4m3fn, torch.float8_e5m2),
}
# What each block of a matrix of microscaled floats is: type of its scale, and columns.
_MICROSCALED = {"MXTensor": (torch.float8_e8m0fnu, 32), "NVFP4Tensor": (torch.float8_e4m3fn, 16)}
_ZEROS = (torch.int8, torch.uint8, torch.int32, torch.int64, *FLOATS)

Note = Mapping[str, object]


@dataclass(frozen=True)
class AffineWeight(ScaledWeight):
    """W = (q - zero) · scale, for tiles of the matrix; a zero is optional."""

    def load_scales(self) -> tuple[Tensor, ...]:
        """Scale and zero of each tile."""
        scale, *zero = (self.lay_out(self.read_scale(part)) for part in self.scales)
        return scale, zero[0] if zero else torch.empty(0), torch.empty(0)


def join_torchao(parts: CheckpointParts) -> None:
    """Makes one weight of each tensor that a header describes.

    Raises:
        UnsupportedFormat: parts that are missing or do not fit together.
    """
    for metadata in parts.metadata:
        for name, text in metadata.items() if _LIST in metadata else ():
            module, _, leaf = name.rpartition(".")
            prefix = f"{module}._{leaf}_"
            if any(prefix + part in parts.weights for part in _PARTS):
                note = parse_json_object(text, f"{parts.where}: {name}")
                _join_tensor(parts, name, prefix, note)


def _join_tensor(parts: CheckpointParts, name: str, prefix: str, note: Note) -> None:
    """One tensor, its parts under keys that begin alike."""
    type_, data, names = (note.get(key) for key in ("_type", "_data", "_tensor_data_names"))
    listed = isinstance(names, list) and all(isinstance(part, str) for part in names)
    if not isinstance(type_, str) or not isinstance(data, dict) or not isinstance(names, list):
        raise parts.refuse(f"the metadata of {name} describes no tensor of torchao")
    if not listed or "qdata" not in names:
        raise parts.refuse(f"the metadata of {name} names no parts of it")
    keys = {part: prefix + part for part in names}
    stored = parts.check_codes(keys["qdata"])
    weight: Weight
    if "act_pre_scale" in names or len(stored.shape) != 2:
        weight = _keep_shape(parts, name, type_, stored, data)
    elif type_ in _ONE_BYTE:
        weight = _scale_tiles(parts, keys, type_, stored, data)
    elif type_ in _MICROSCALED:
        weight = _scale_blocks(parts, keys, type_, stored, data)
    else:
        weight = _keep_shape(parts, name, type_, stored, data)
    parts.join(keys.values(), name, weight)


def _scale_tiles(
    parts: CheckpointParts, keys: Mapping[str, str], type_: str, stored: Weight, data: Note
) -> Weight:
    """Codes of one byte, with a scale and maybe a zero for each tile."""
    block = read_sizes(data.get("block_size"))
    if block is None or len(block) != 2 or stored.dtype not in _ONE_BYTE[type_]:
        raise parts.refuse(
            f"{keys['qdata']} is {stored.dtype} in blocks of {data.get('block_size')!r:.40}"
        )
    tile = [min(n, size) for n, size in zip(block, stored.shape, strict=True)]
    if any(size % n for n, size in zip(tile, stored.shape, strict=True)):
        raise parts.refuse(f"{keys['qdata']}: {list(stored.shape)} is not whole blocks of {tile}")
    tiles = stored.shape[0] // tile[0], stored.shape[1] // tile[1]
    scales = [parts.check(keys["scale"], FLOATS, tiles)] if "scale" in keys else []
    if not scales:
        raise parts.refuse(f"{keys['qdata']} has no scale")
    if "zero_point" in keys:
        scales.append(parts.check(keys["zero_point"], _ZEROS, tiles))
    rows, columns = tile
    return AffineWeight(f"torchao {type_}", stored, tuple(scales), stored.shape, (rows, columns))


def _scale_blocks(
    parts: CheckpointParts, keys: Mapping[str, str], type_: str, stored: Weight, data: Note
) -> Weight:
    """MXFP8, MXFP4 and NVFP4, with their scales row by row or in the order of matrix units."""
    dtype, block = _MICROSCALED[type_]
    packed = stored.dtype == torch.uint8
    rows, columns = stored.shape[0], stored.shape[1] * (2 if packed else 1)
    element = data.get("elem_dtype")
    named = element.get("_data") if isinstance(element, dict) else "float4_e2m1fn_x2"
    expected = {"float4_e2m1fn_x2": torch.uint8, "float8_e4m3fn": torch.float8_e4m3fn}
    expected["float8_e5m2"] = torch.float8_e5m2
    if expected.get(str(named)) != stored.dtype or data.get("block_size") != block:
        raise parts.refuse(
            f"{keys['qdata']} is {stored.dtype} in blocks of {data.get('block_size')!r:.40}, not "
            f"{named!r:.40} in blocks of {block}"
        )
    if not all(stored.shape) or columns % block or "scale" not in keys:
        raise parts.refuse(
            f"{keys['qdata']}: {columns} columns are not whole blocks of {block} with scales"
        )
    ordered = data.get("is_swizzled_scales", False) is True
    scale = parts.need(keys["scale"], keys["qdata"])
    wide = columns // block
    count = count_blocked_scales(rows, wide) if ordered else rows * wide
    if scale.dtype != dtype or math.prod(scale.shape) != count:
        raise parts.refuse(
            f"{keys['scale']} is {scale.dtype} {list(scale.shape)}, not {count} scales"
        )
    scales = [scale]
    if "per_tensor_scale" in keys:
        scales.append(parts.check(keys["per_tensor_scale"], FLOATS, ()))
    kind = "torchao " + ("NVFP4" if block == 16 else "MXFP4" if packed else "MXFP8")
    return TiledScaleWeight(
        kind,
        stored,
        tuple(scales),
        (rows, columns),
        (1, block),
        read_e2m1 if packed else read_floats,
        stored_rows=rows,
        powers=block == 32,
        ordered=ordered,
    )


def _keep_shape(
    parts: CheckpointParts, name: str, type_: str, stored: Weight, data: Note
) -> UnreadableWeight:
    """A tensor whose numbers are not read; its shape is noted, or that of its codes."""
    shape = read_sizes(data.get("shape", list(stored.shape) if type_ in _ONE_BYTE else None))
    if shape is None:
        raise parts.refuse(
            f"{name} is quantised as torchao's {type_:.60}, and nothing in the file says of which "
            "shape it is; use the fp16 or bf16 version"
        )
    return UnreadableWeight(f"torchao {type_:.60}", stored, shape)
