"""Numbers back into the kinds of storage that can be written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InvalidOption, UnsupportedFormat
from ...files.gguf_file import PLAIN, GgufFile, dequantise, load_gguf
from ..weights import LoadedWeight, StoredWeight, Weight
from .codes import read_floats, rotate_back
from .comfy import RotatedWeight, TiledScaleWeight
from .weight import QuantisedWeight, ScaledWeight

GGUF_KINDS = ("Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "BF16", "F16", "F32")
"""The kinds of GGUF that are written; K and IQ kinds need a search that is llama.cpp's."""

Parts = tuple[Tensor | None, ...]
"""New contents of codes and scales, in the order of the weight's fields; None stays as it is."""


class BakedTensors(NamedTuple):
    """A weight as it is stored."""

    tensors: dict[StoredWeight, Tensor]  # what changes in the file
    numbers: Tensor  # what these stand for, decoded as any reader does


def can_encode(root: Weight) -> bool:
    """Returns True if `encode` writes this kind of weight."""
    if isinstance(root, ScaledWeight):
        return _find_codec(root) is not None
    if isinstance(root, StoredWeight) and isinstance(root.file, GgufFile):
        kind = root.file.tensors[root.key].quantised_as or ""
        return root.dtype.is_floating_point and (not kind or kind.split()[1] in GGUF_KINDS)
    return root.dtype.is_floating_point and not isinstance(root, QuantisedWeight)


def load_package(root: Weight) -> None:
    """Imports the package that writes this kind of weight, if it takes one.

    Raises:
        UnsupportedFormat: it is not installed, or torch is too old for it.
    """
    if isinstance(root, ScaledWeight) and _find_codec(root) not in (None, _encode_float8):
        _load_kitchen(root)


def encode(root: Weight, numbers: Tensor, random: torch.Generator | None) -> BakedTensors:
    """Encodes numbers [*shape] as a weight is stored, to the nearest or at random.

    Scales follow the numbers as their writers make them, except float8's, which stay.

    Args:
        root: the weight, of a kind for which `can_encode` is true.
        numbers: float32 or better.
        random: rounds up or down by chance, so that the mean is right; None rounds to the nearest.

    Raises:
        InvalidOption: random rounding of a kind that has none.
        UnsupportedFormat: a package that writes this kind is missing.
    """
    if isinstance(root, ScaledWeight):
        return _encode_scaled(root, numbers, random)
    if not isinstance(root, StoredWeight):
        return BakedTensors({}, round_to(numbers, root.dtype, random))
    if isinstance(root.file, GgufFile) and root.file.tensors[root.key].code not in PLAIN:
        return _encode_gguf(root, numbers, random)
    written = round_to(numbers, root.dtype, random)
    return BakedTensors({root: written}, written)


def round_to(codes: Tensor, dtype: torch.dtype, random: torch.Generator | None) -> Tensor:
    """Rounds numbers to a float type; float8 is clamped to its largest number."""
    if random is not None and dtype != codes.dtype:
        codes = _round_at_random(codes, dtype, random)
    if dtype.itemsize == 1:  # torch makes NaN of what is too large
        largest = torch.finfo(dtype).max
        codes = codes.clamp(-largest, largest)
    return codes.to(dtype).contiguous()


def _round_at_random(codes: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds up or down to a float type's numbers, so that the mean is right."""
    info = torch.finfo(dtype)
    exponent = codes.abs().clamp_min(info.smallest_normal).log2().floor()
    steps = codes / torch.exp2(exponent) / info.eps
    low = steps.floor()
    up = torch.rand(codes.shape, generator=generator, dtype=codes.dtype) < steps - low
    return (low + up) * info.eps * torch.exp2(exponent)


def _encode_gguf(
    root: StoredWeight, numbers: Tensor, random: torch.Generator | None
) -> BakedTensors:
    """Encodes blocks by the `gguf` package, and decodes them again."""
    if random is not None:
        raise InvalidOption(
            f"`stochastic` is not for {root.name}: GGUF's blocks are rounded to the nearest"
        )
    assert isinstance(root.file, GgufFile)
    info, package = root.file.tensors[root.key], load_gguf()
    rows = numbers.reshape(info.rows, -1).float().numpy()
    blocks = package.quants.quantize(rows, package.GGMLQuantizationType(info.code))
    raw = torch.from_numpy(blocks).contiguous()
    return BakedTensors({root: raw}, dequantise(raw, info.code).reshape(info.shape))


def _encode_scaled(
    root: ScaledWeight, numbers: Tensor, random: torch.Generator | None
) -> BakedTensors:
    codec = _find_codec(root)
    assert codec is not None
    parts = root.stored, *root.scales
    fresh = codec(root, numbers, random)
    tensors: dict[StoredWeight, Tensor] = {}
    loaded: list[Weight] = []
    for part, tensor in zip(parts, fresh, strict=True):
        if tensor is None:
            loaded.append(part)
            continue
        tensor = tensor.reshape(part.shape).to(part.dtype)
        loaded.append(LoadedWeight(tensor, part.name))
        if isinstance(part, StoredWeight):
            tensors[part] = tensor.contiguous()
    decoded = replace(root, stored=loaded[0], scales=tuple(loaded[1:]))
    return BakedTensors(tensors, decoded.read().to(numbers.dtype))


Codec = Callable[[Any, Tensor, "torch.Generator | None"], Parts]


def _find_codec(root: ScaledWeight) -> Codec | None:
    """Returns what encodes this kind; None if nothing does."""
    if isinstance(root, TiledScaleWeight):
        return _encode_mxfp8 if root.powers else _encode_nvfp4
    if root.stored.dtype == torch.int8 and root.unpack is read_floats:
        return _encode_int8
    per_row = root.tile[1] == math.prod(root.shape[1:])
    is_float8 = root.stored.dtype.is_floating_point and root.stored.dtype.itemsize == 1
    return _encode_float8 if is_float8 and per_row and type(root) is ScaledWeight else None


def _encode_float8(root: ScaledWeight, numbers: Tensor, random: torch.Generator | None) -> Parts:
    """Divides by the stored scale, which stays."""
    tiles = root.load_scales()[0][:, 0]
    scale = tiles.repeat_interleave(root.tile[0])[: len(numbers)]
    scale = scale.reshape(-1, *[1] * (numbers.ndim - 1))
    return round_to(numbers / scale, root.stored.dtype, random), *[None] * len(root.scales)


def _encode_int8(root: ScaledWeight, numbers: Tensor, random: torch.Generator | None) -> Parts:
    """Encodes by one scale, or one for each row, of columns that may be rotated."""
    matrix = numbers.float().flatten(1)
    if isinstance(root, RotatedWeight):
        matrix = rotate_back(matrix, root.size)  # the rotation is its own inverse
    kitchen, seed = _load_kitchen(root), _draw_seed(random)
    if math.prod(root.scales[0].shape) == 1:
        return tuple(kitchen.quantize_int8_tensorwise(matrix, stochastic_rounding=seed))
    return tuple(kitchen.quantize_int8_rowwise(matrix, stochastic_rounding=seed))


def _draw_seed(random: torch.Generator | None) -> int:
    """Generates the seed of a rounding; 0 rounds to the nearest."""
    return 0 if random is None else int(torch.randint(1, 2**31 - 1, (), generator=random))


def _encode_nvfp4(root: TiledScaleWeight, numbers: Tensor, random: Any) -> Parts:
    """Encodes blocks of 16 columns, with a scale each and one for all."""
    _refuse_random(root, random)
    kitchen, matrix = _load_kitchen(root), numbers.float()
    inputs: tuple[None, ...] = ()
    if len(root.scales) > 2:  # the file has a factor for each column
        matrix, inputs = matrix / root.load_scales()[3], (None,)
    largest = torch.finfo(torch.float8_e4m3fn).max * 6.0  # of a block's scale, of a code
    scale = (matrix.abs().amax() / largest).clamp_min(torch.finfo(torch.float32).tiny)
    codes, blocks = kitchen.quantize_nvfp4(_pad_rows(root, matrix), scale)
    return codes, _as_stored(root.scales[0], blocks), scale, *inputs


def _encode_mxfp8(root: TiledScaleWeight, numbers: Tensor, random: Any) -> Parts:
    """Encodes blocks of 32 columns, with a power of two each."""
    _refuse_random(root, random)
    codes, blocks = _load_kitchen(root).quantize_mxfp8(_pad_rows(root, numbers.float()))
    return codes, _as_stored(root.scales[0], blocks)


def _pad_rows(root: TiledScaleWeight, matrix: Tensor) -> Tensor:
    """Pads with rows of zeros to those that are stored."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, root.stored_rows - len(matrix)))


def _as_stored(scale: Weight, blocks: Tensor) -> Tensor:
    """Views scales of a byte in the type that the file has."""
    return blocks.contiguous().view(torch.uint8).view(scale.dtype)


def _refuse_random(root: ScaledWeight, random: Any) -> None:
    if random is not None:
        raise InvalidOption(
            f"`stochastic` is not for {root.name}: {root.kind} is rounded to the nearest"
        )


@cache
def _import_kitchen() -> Any:
    import comfy_kitchen

    return comfy_kitchen


def _load_kitchen(root: ScaledWeight) -> Any:
    """Imports comfy-kitchen, which writes ComfyUI's kinds.

    Raises:
        UnsupportedFormat: it is not installed, or torch is too old for it.
    """
    try:
        return _import_kitchen()
    except (ImportError, ValueError) as error:
        way_out = "pip install comfy-kitchen"
        if isinstance(error, ValueError):  # what it registers has types that torch does not know
            way_out = f"comfy-kitchen needs a newer torch than {torch.__version__}"
        raise UnsupportedFormat(
            f"{root.name}: {root.kind} is written by a package: {way_out}; or bake "
            "into the fp16 or bf16 version of this model"
        ) from error
