"""ComfyUI's quantised layers, and the scaled float8 from which its notation grew.

A note says how a layer is quantised: a tensor of bytes `<module>.comfy_quant`, or an entry in the
header's `_quantization_metadata`. Older files have float8 with `<module>.scale_weight` and a marker
`scaled_fp8` in place of notes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...files.jsontext import parse_json_object
from ..weights import Weight
from .codes import (
    FLOATS,
    count_blocked_scales,
    read_e2m1_swapped,
    read_powers,
    read_signed,
    read_unsigned,
    rotate_back,
    unblock_scales,
)
from .parts import PREFIXES, CheckpointParts
from .weight import ScaledWeight, scale_rows

QUANTISATION_KEY = "_quantization_metadata"
_NOTE = ".comfy_quant"
_MARKER = "scaled_fp8"
_SCALES = (".scale_weight", ".weight_scale")
# Scales of activations; the weight does not depend on them.
_OF_ACTIVATIONS = (".scale_input", ".input_scale")
_FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_BYTES = (torch.uint8, torch.int8)
_LARGEST_ROTATION = 4096

Note = Mapping[str, object]


@dataclass(frozen=True)
class TiledScaleWeight(ScaledWeight):
    """NVFP4 and MXFP8: a scale for some columns of a row, in tiles."""

    stored_rows: int = 0  # rows that are stored; the shape may have fewer
    powers: bool = False  # the scales are exponents of 2

    def load_scales(self) -> tuple[Tensor, ...]:
        """Reads the scales of the blocks, and of the inputs.

        NVFP4's are multiplied by the scale of the weight.
        """
        blocks, *rest = self.scales
        codes = blocks.read().view(torch.uint8)
        numbers = read_powers(codes) if self.powers else codes.view(torch.float8_e4m3fn).float()
        wide = self.shape[1] // self.tile[1]
        scale = unblock_scales(numbers, self.stored_rows, wide)
        self.check_scale(scale, blocks)
        if rest:
            scale = scale * self.read_scale(rest[0], zero=False)
        # One number for each column, however they lie in the file.
        inputs = self.read_scale(rest[1]).flatten() if len(rest) > 1 else torch.empty(0)
        return scale, torch.empty(0), torch.empty(0), inputs

    def decode(self, start: int, stop: int, scales: tuple[Tensor, ...]) -> Tensor:
        """Multiplies the codes by the scale of their block, and of their input."""
        numbers, inputs = super().decode(start, stop, scales), scales[3]
        return numbers.flatten(1).mul_(inputs) if len(inputs) else numbers


@dataclass(frozen=True)
class RotatedWeight(ScaledWeight):
    """ConvRot: int8 or int4 codes of a matrix with rotated columns.

    Each row has a scale.
    """

    size: int = 256  # columns that are rotated together

    def decode(self, start: int, stop: int, scales: tuple[Tensor, ...]) -> Tensor:
        """Multiplies the codes by the scale of their row, and rotates them back."""
        return rotate_back(super().decode(start, stop, scales).flatten(1), self.size)


@dataclass(frozen=True)
class ZeroPointWeight(ScaledWeight):
    """AWQ: W = (q - 8) · scale + shift; these are stored [n/columns, m]."""

    def load_scales(self) -> tuple[Tensor, ...]:
        """Reads scale, zero and shift of each tile."""
        tiles = self.shape[1] // self.tile[1], self.shape[0]
        scale, shift = (self.read_scale(part).reshape(tiles).mT for part in self.scales)
        return scale, torch.full_like(scale, 8), shift


def join_comfy(parts: CheckpointParts) -> None:
    """Makes one weight of each layer with a note, and of float8 with a scale.

    Raises:
        UnsupportedFormat: parts that are missing or do not fit together.
    """
    for module, note in _find_notes(parts).items():
        if f"{module}.weight" not in parts.weights:
            raise parts.refuse(
                f"a note says how {module} is quantised, and its weight is missing; download it "
                "again or use the fp16 or bf16 version"
            )
        _join_layer(parts, module, note)
    for key in [key for key in parts if key.endswith(_SCALES)]:
        _join_older(parts, key)
    markers = [key for key in parts if key.rpartition(".")[2] == _MARKER]
    for key in list(parts):
        weight = parts.weights[key]
        if markers and weight.dtype in _FLOAT8.values() and key not in markers:
            raise _refuse_unscaled(parts, key)
        if key in markers or key.endswith(_OF_ACTIVATIONS):
            parts.drop(key)


def _find_notes(parts: CheckpointParts) -> dict[str, Note]:
    """Returns module (as the keys spell it) -> what its note says."""
    notes: dict[str, Note] = {}
    for metadata in parts.metadata:
        if QUANTISATION_KEY not in metadata:
            continue
        where = f"{parts.where}: {QUANTISATION_KEY}"
        layers = parse_json_object(metadata[QUANTISATION_KEY], where).get("layers")
        if not isinstance(layers, dict):
            raise parts.refuse(f"{QUANTISATION_KEY} lists no layers")
        for module, note in layers.items():
            # Some writers leave out the prefix of the model.
            names = (module, *(prefix + module for prefix in PREFIXES))
            owner = next((name for name in names if f"{name}.weight" in parts.weights), module)
            notes[owner] = note if isinstance(note, dict) else {}
    for key in [key for key in parts if key.endswith(_NOTE)]:
        notes[key.removesuffix(_NOTE)] = parts.read_note(key)
        parts.drop(key)
    return notes


def _join_layer(parts: CheckpointParts, module: str, note: Note) -> None:
    format_ = note.get("format")
    if isinstance(format_, str) and format_ in _FLOAT8:
        if not any(parts.get(module + scale) for scale in _SCALES):
            raise _refuse_unscaled(parts, f"{module}.weight")
        return  # as without a note
    if not isinstance(format_, str) or format_ not in _FORMATS:
        raise parts.refuse(
            f"{module}.weight is quantised as {format_!r:.60}, which is not read: use the fp16 or "
            "bf16 version, or GGUF"
        )
    _FORMATS[format_](parts, module, note)


def _join_nvfp4(parts: CheckpointParts, module: str, note: Note) -> None:
    key = f"{module}.weight"
    stored = _check_codes(parts, key, (torch.uint8,), 16)
    rows, columns = stored.shape[0], 2 * stored.shape[1]
    scales = [
        _check_blocked(
            parts, f"{key}_scale", (torch.float8_e4m3fn, torch.uint8), rows, columns // 16
        ),
        parts.check(f"{key}_scale_2", FLOATS, ()),
    ]
    keys = [key, f"{key}_scale", f"{key}_scale_2"]
    if (inputs := f"{module}.pre_quant_scale") in parts.weights:
        one_row = parts.weights[inputs].shape[:1] == (1,)  # a number a column, in either way
        scales.append(parts.check(inputs, FLOATS, (1, columns) if one_row else (columns,)))
        keys.append(inputs)
    shape = _cut_rows(parts, module, rows, 16), columns
    tile = 1, 16
    weight = TiledScaleWeight(
        "nvfp4", stored, tuple(scales), shape, tile, read_e2m1_swapped, stored_rows=rows
    )
    parts.join(keys, key, weight)


def _join_mxfp8(parts: CheckpointParts, module: str, note: Note) -> None:
    key = f"{module}.weight"
    stored = _check_codes(parts, key, (torch.float8_e4m3fn,), 32)
    rows, columns = stored.shape
    dtypes = getattr(torch, "float8_e8m0fnu", torch.uint8), torch.uint8  # since torch 2.7
    scale = _check_blocked(parts, f"{key}_scale", dtypes, rows, columns // 32)
    shape = _cut_rows(parts, module, rows, 32), columns
    weight = TiledScaleWeight(
        "mxfp8", stored, (scale,), shape, (1, 32), stored_rows=rows, powers=True
    )
    parts.join([key, f"{key}_scale"], key, weight)


def _join_int8(parts: CheckpointParts, module: str, note: Note) -> None:
    """Joins int8 with one scale or one for each row, rotated or not."""
    key, scale_key = f"{module}.weight", f"{module}.weight_scale"
    stored = parts.check_codes(key, (torch.int8,))
    scale = parts.need(scale_key, key)
    rows = stored.shape[0]
    scale = parts.check(scale_key, FLOATS, () if math.prod(scale.shape) == 1 else (rows,))
    settings = _read_settings(note)
    if not settings.get("convrot", False):
        weight: Weight = scale_rows("int8", stored, scale)
    else:
        kind, columns = "int8, rotated (ConvRot)", stored.shape[-1]
        size = _check_rotation(parts, key, settings, columns)
        tile = scale_rows(kind, stored, scale).tile
        weight = RotatedWeight(kind, stored, (scale,), stored.shape, tile, size=size)
    parts.join([key, scale_key], key, weight)


def _join_int4(parts: CheckpointParts, module: str, note: Note) -> None:
    """Joins rotated int4 with a scale for each row."""
    key, scale_key = f"{module}.weight", f"{module}.weight_scale"
    stored = _check_codes(parts, key, _BYTES, 1)
    rows, columns = stored.shape[0], 2 * stored.shape[1]
    scale = parts.check(scale_key, FLOATS, (rows,))
    size = _check_rotation(parts, key, _read_settings(note), columns)
    kind = "int4, rotated (ConvRot)"
    shape = rows, columns
    weight = RotatedWeight(kind, stored, (scale,), shape, (1, columns), read_signed, size=size)
    parts.join([key, scale_key], key, weight)


def _read_settings(note: Note) -> Note:
    """Flattens a note: entries below `params` join the others."""
    more = note.get("params")
    return {**more, **note} if isinstance(more, dict) else note


def _join_awq(parts: CheckpointParts, module: str, note: Note) -> None:
    key = f"{module}.weight"
    stored = _check_codes(parts, key, _BYTES, 1)
    rows, columns = stored.shape[0], 2 * stored.shape[1]
    block = _read_size(parts, key, note, "group_size", 64, columns)
    keys = [f"{key}_scale", f"{key}_zeros"]
    scales = tuple(parts.check(name, FLOATS, (columns // block, rows)) for name in keys)
    weight = ZeroPointWeight("AWQ int4", stored, scales, (rows, columns), (1, block), read_unsigned)
    parts.join([key, *keys], key, weight)


_FORMATS: dict[str, Callable[[CheckpointParts, str, Note], None]] = {
    "nvfp4": _join_nvfp4,
    "mxfp8": _join_mxfp8,
    "int8_tensorwise": _join_int8,
    "convrot_w4a4": _join_int4,
    "awq_w4a16": _join_awq,
}


def _join_older(parts: CheckpointParts, key: str) -> None:
    """Joins a weight and its scale without a note.

    The scale is one number, or one for each row.
    """
    module = key.rpartition(".")[0]
    if parts.get(f"{module}.weight") is None:
        raise parts.refuse(f"{key} scales {module}.weight, which is not there")
    stored, scale = parts.check_codes(f"{module}.weight"), parts.weights[key]
    size, rows = math.prod(scale.shape), stored.shape[0]
    per_row = size == rows and scale.shape[:1] == (rows,)
    if not scale.dtype.is_floating_point or not (size == 1 or per_row):
        raise parts.refuse(
            f"{key} is {scale.dtype} {list(scale.shape)}; only one scale for the whole weight or "
            "one for each of its rows is read: use the fp16 or bf16 version"
        )
    # The older notation scales any dtype; the newer one is for float8 alone.
    old = key.endswith(_SCALES[0]) and stored.dtype.is_floating_point
    if stored.dtype not in _FLOAT8.values() and not old:
        raise parts.refuse(
            f"{key} scales a weight stored as {stored.dtype}, and no note says how; only float8 is "
            "read without: use the fp16 or bf16 version"
        )
    kind = "float8 with scales" if stored.dtype in _FLOAT8.values() else "scaled"
    parts.join([f"{module}.weight", key], f"{module}.weight", scale_rows(kind, stored, scale))


def _check_codes(
    parts: CheckpointParts, key: str, dtypes: tuple[torch.dtype, ...], multiple: int
) -> Weight:
    """Returns a matrix of codes; rows and columns must be multiples of `multiple`."""
    stored = parts.check_codes(key, dtypes, 2)
    columns = stored.shape[1] * (2 if stored.dtype in _BYTES else 1)
    if stored.shape[0] % multiple or columns % multiple:
        raise parts.refuse(
            f"{key}: {stored.shape[0]} rows of {columns} numbers are not multiples of {multiple}, "
            "which its note promises; download it again"
        )
    return stored


def _check_blocked(
    parts: CheckpointParts, key: str, dtypes: tuple[torch.dtype, ...], rows: int, columns: int
) -> Weight:
    """Scales in whole tiles."""
    scale, count = parts.need(key, "a quantised layer"), count_blocked_scales(rows, columns)
    if scale.dtype not in dtypes or math.prod(scale.shape) != count:
        raise parts.refuse(
            f"{key} is {scale.dtype} {list(scale.shape)}, not {count} scales as {dtypes[0]}; "
            "download it again"
        )
    return scale


def _cut_rows(parts: CheckpointParts, module: str, rows: int, multiple: int) -> int:
    """Returns the rows without padding to a multiple, as the bias tells."""
    bias = parts.weights.get(f"{module}.bias")
    outputs = bias.shape[0] if bias is not None and len(bias.shape) == 1 else 0
    return outputs if outputs and -(-outputs // multiple) * multiple == rows else rows


def _check_rotation(parts: CheckpointParts, key: str, settings: Note, columns: int) -> int:
    """Returns how many columns are rotated together: a power of 4."""
    size = _read_size(parts, key, settings, "convrot_groupsize", 256, columns)
    if size < 4 or size > _LARGEST_ROTATION or 4 ** (size.bit_length() // 2) != size:
        raise parts.refuse(f"{key}: {size} columns rotated together are not a power of 4")
    return size


def _read_size(
    parts: CheckpointParts, key: str, settings: Note, name: str, default: int, columns: int
) -> int:
    """Reads a number of columns from a note; it must divide all columns."""
    size = settings.get(name, default)
    if type(size) is not int or size < 1 or columns % size:
        raise parts.refuse(f"{key}: its note has {name} {size!r:.40} for {columns} columns")
    return size


def _refuse_unscaled(parts: CheckpointParts, key: str) -> Exception:
    return parts.refuse(
        f"{key} has no scale, though the checkpoint says that its weights are scaled; download it "
        "again or use the fp16 or bf16 version"
    )
