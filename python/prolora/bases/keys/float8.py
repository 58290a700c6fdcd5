"""Checkpoints of fewer bits: float8 with scales is read, everything else is refused by name.

Three notations of the same thing, W = q · scale: `<module>.scale_weight` beside a marker
`scaled_fp8`; `<module>.weight_scale` with a list of layers in the header's metadata; the same with
a note `<module>.comfy_quant` beside each layer. The scale is one number or one for each row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping

import torch

from ...errors import UnsupportedFormat
from ...files.jsontext import parse_json_object
from ..weights import ScaledWeight, Weight

METADATA_KEY = "_quantization_metadata"
_FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_SCALES = (".scale_weight", ".weight_scale")
_MARKER = "scaled_fp8"
_NOTE = ".comfy_quant"
# What an activation is scaled by; the weight does not depend on it.
_OF_ACTIVATIONS = (".scale_input", ".input_scale")
_REFUSED = re.compile(
    r"(?:^|\.)(?:weight_scale_\w+|scale_weight_\w+|pre_quant_scale|absmax|nested_absmax|quant_map"
    r"|nested_quant_map|quant_state\..*|SCB|qweight|qzeros|scales|g_idx|wscales|smooth_factor\w*"
    r"|weight\._(?:data|scale|shift)(?:\._\w+)?)$"
)
_NOTE_LIMIT = 65_536


def apply_scales(
    weights: Mapping[str, Weight], metadata: Iterable[str], where: str
) -> dict[str, Weight]:
    """The weights with every float8 weight and its scale made one.

    Args:
        weights: all keys of a checkpoint.
        metadata: texts of `_quantization_metadata`, one for each file that has it.
        where: what messages call the checkpoint.

    Raises:
        UnsupportedFormat: another kind of quantisation, a scale of another shape, or a scale that
            is missing.
    """
    _refuse_other_formats(weights, where)
    formats = _read_formats(weights, metadata, where)
    scales = {key: weight for key, weight in weights.items() if key.endswith(_SCALES)}
    notes = (*_SCALES, *_OF_ACTIVATIONS, _NOTE)
    plain = {
        key: weight
        for key, weight in weights.items()
        if not key.endswith(notes) and key.rpartition(".")[2] != _MARKER
    }
    for key, scale in scales.items():
        module = key.rpartition(".")[0]
        stored = plain.get(f"{module}.weight")
        if stored is None:
            raise UnsupportedFormat(f"{where}: {key} scales {module}.weight, which is not there")
        plain[f"{module}.weight"] = _apply_scale(stored, scale, key, where)
    old = any(key.rpartition(".")[2] == _MARKER for key in weights)
    for key, weight in plain.items():
        module = key.removesuffix(".weight")
        expected = formats.get(module)
        unscaled = not isinstance(weight, ScaledWeight)
        if unscaled and (expected or (old and weight.dtype in _FLOAT8.values())):
            raise UnsupportedFormat(
                f"{where}: {key} has no scale, though the checkpoint says that its weights are "
                "scaled; download it again or use the fp16 or bf16 version"
            )
    return plain


def _apply_scale(stored: Weight, scale: Weight, key: str, where: str) -> ScaledWeight:
    """The weight and its scale, if this is a notation that is read."""
    size = math.prod(scale.shape)
    rows = stored.shape[0] if stored.shape else 0
    per_row = size == rows and scale.shape[:1] == (rows,)
    if not scale.dtype.is_floating_point or not (size == 1 or per_row):
        raise UnsupportedFormat(
            f"{where}: {key} is {scale.dtype} {list(scale.shape)}; only one scale for the whole "
            "weight or one for each of its rows is read: use the fp16 or bf16 version"
        )
    # The older notation multiplies whatever it finds; the newer one is for float8 alone.
    old = key.endswith(_SCALES[0]) and stored.dtype.is_floating_point
    if stored.dtype not in _FLOAT8.values() and not old:
        raise UnsupportedFormat(
            f"{where}: {key} scales a weight stored as {stored.dtype}; only float8 with scales is "
            "read: use the fp16 or bf16 version"
        )
    return ScaledWeight(stored, scale)


def _read_formats(
    weights: Mapping[str, Weight], metadata: Iterable[str], where: str
) -> dict[str, str]:
    """Module (as the keys spell it) -> format, of every layer that is marked as quantised."""
    formats: dict[str, str] = {}
    for text in metadata:
        layers = parse_json_object(text, f"{where}: {METADATA_KEY}").get("layers")
        if not isinstance(layers, dict):
            raise UnsupportedFormat(f"{where}: {METADATA_KEY} lists no layers")
        for module, note in layers.items():
            formats[_find_module_key(module, weights)] = _check_format(note, module, where)
    for key in weights:
        if key.endswith(_NOTE):
            module = key.removesuffix(_NOTE)
            formats[module] = _check_format(_read_note(weights[key], key, where), module, where)
    return formats


def _find_module_key(module: str, weights: Mapping[str, Weight]) -> str:
    """Some writers leave out the prefix of the model."""
    if f"{module}.weight" in weights:
        return module
    prefixed = f"model.diffusion_model.{module}"
    return prefixed if f"{prefixed}.weight" in weights else module


def _check_format(note: object, module: str, where: str) -> str:
    """The format of one layer, if it is one that is read."""
    format_ = note.get("format") if isinstance(note, dict) else None
    if format_ not in _FLOAT8:
        raise UnsupportedFormat(
            f"{where}: {module} is quantised as {format_!r:.60}; of the quantised formats only "
            f"{' and '.join(_FLOAT8)} are read: use the fp16 or bf16 version"
        )
    return str(format_)


def _read_note(weight: Weight, key: str, where: str) -> dict[str, object]:
    """The JSON text that a tensor of bytes holds."""
    if weight.dtype != torch.uint8 or math.prod(weight.shape) > _NOTE_LIMIT:
        raise UnsupportedFormat(f"{where}: {key} is not a note of a quantised layer")
    return parse_json_object(bytes(weight.read().flatten().tolist()), f"{where}: {key}")


def _refuse_other_formats(keys: Collection[str], where: str) -> None:
    key = next((key for key in keys if _REFUSED.search(key)), None)
    if key is not None:
        raise UnsupportedFormat(
            f"{where}: a quantised checkpoint ({key}); of these only float8 with one scale for a "
            "weight or a row, and GGUF, are read: use the fp16 or bf16 version"
        )
