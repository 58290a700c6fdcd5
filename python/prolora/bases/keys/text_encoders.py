"""Text encoders that lie in the same checkpoint as their model.

Canonical names are transformers' with `text_encoder.`, `text_encoder_2.` or `text_encoder_3.` in
front, the names LoRA files are read into. OpenCLIP keeps q, k and v in one matrix and its last
projection transposed; both are views.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ...architectures.modules import TEXT_ENCODER_PREFIXES
from ...errors import ShapeMismatch
from ..weights import ConvertedWeight, RowsWeight, Weight

# A single file's prefix of an encoder, its canonical prefix, and whether the names are OpenCLIP's.
# SDXL's are `conditioner.embedders`, those of SD1.x and 2.x `cond_stage_model`.
_STORED = (
    ("cond_stage_model.transformer.", "text_encoder.", False),
    ("cond_stage_model.model.", "text_encoder.", True),
    ("conditioner.embedders.0.transformer.", "text_encoder.", False),
    ("conditioner.embedders.1.model.", "text_encoder_2.", True),
    ("text_encoders.clip_l.transformer.", "text_encoder.", False),
    ("text_encoders.clip_h.transformer.", "text_encoder.", False),
    ("text_encoders.clip_g.transformer.", "text_encoder_2.", False),
    *((prefix, prefix, False) for prefix in TEXT_ENCODER_PREFIXES),
)
_T5 = "text_encoders.t5xxl.transformer."
_OPEN_CLIP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding",
}
_OPEN_CLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d{1,3})\.(.+)")
_OPEN_CLIP_PARTS = {
    "attn.out_proj.weight": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
}
_HEADS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def split_encoders(
    weights: Mapping[str, Weight], where: str
) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """Returns ({canonical module: weight} of the text encoders, the other keys).

    Raises:
        ShapeMismatch: a fused matrix that cannot be cut in three.
    """
    encoders: dict[str, Weight] = {}
    rest: dict[str, Weight] = {}
    for key, weight, entry in _find_prefixes(weights):
        if entry is None:
            rest[key] = weight
            continue
        start, prefix, open_clip = entry
        local = key.removeprefix(start)
        if open_clip:
            named = _convert_open_clip(local, weight, where)
        else:
            named = {_add_text_model(local.removesuffix(".weight")): weight}
        for module, view in named.items():
            if len(view.shape) >= 2 and view.dtype.is_floating_point:
                encoders[prefix + module] = view
    return encoders, rest


def name_encoder_vectors(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Returns the text encoders' tensors that are no module's weight.

    Biases and norms are "module.bias" and "module.weight"; OpenCLIP's, which are fused in other
    ways, and what is neither go by their own keys.
    """
    named: dict[str, Weight] = {}
    for key, weight, entry in _find_prefixes(weights):
        if entry is None:
            continue
        start, prefix, open_clip = entry
        local, plain = key.removeprefix(start), weight.dtype.is_floating_point
        module, _, tensor = local.rpartition(".")
        if len(weight.shape) == 1 and plain and not open_clip:
            named[f"{prefix}{_add_text_model(module)}.{tensor}"] = weight
        elif (
            len(weight.shape) < 2
            or not plain
            or (open_clip and not _convert_open_clip(local, weight, ""))
        ):
            named[key] = weight
    return named


def _find_prefixes(
    weights: Mapping[str, Weight],
) -> Iterator[tuple[str, Weight, tuple[str, str, bool] | None]]:
    """Yields each key with its weight and entry of `_STORED`, None outside text encoders.

    T5 is the last encoder: SD3 has two CLIPs before it, FLUX one, PixArt none.
    """
    clips = ("text_encoders.clip_l.", "text_encoders.clip_g.")
    before = sum(any(key.startswith(clip) for key in weights) for clip in clips)
    stored = [*_STORED, (_T5, TEXT_ENCODER_PREFIXES[before], False)]
    for key, weight in weights.items():
        yield key, weight, next((entry for entry in stored if key.startswith(entry[0])), None)


def _add_text_model(module: str) -> str:
    """Files and LoRAs have CLIP's outer `text_model.`, which transformers 5 leaves out."""
    is_clip = module.startswith(("encoder.layers.", "embeddings."))
    return f"text_model.{module}" if is_clip else module


def _convert_open_clip(local: str, weight: Weight, where: str) -> dict[str, Weight]:
    """Returns the modules that one tensor of OpenCLIP holds."""
    if local in _OPEN_CLIP:
        return {_OPEN_CLIP[local]: weight}
    if local == "text_projection":  # features @ text_projection
        return {local: ConvertedWeight(weight, transposed=True)} if len(weight.shape) == 2 else {}
    match = _OPEN_CLIP_LAYER.fullmatch(local)
    if match is None:
        return {}
    layer = f"text_model.encoder.layers.{match[1]}."
    if match[2] in _OPEN_CLIP_PARTS:
        return {layer + _OPEN_CLIP_PARTS[match[2]]: weight}
    if match[2] != "attn.in_proj_weight":
        return {}
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    if rows != 3 * columns or not rows:
        raise ShapeMismatch(
            f"{where}: {local} is {list(weight.shape)}, which is not q, k and v of equal size"
        )
    return {
        layer + head: RowsWeight(weight, i * columns, (i + 1) * columns)
        for i, head in enumerate(_HEADS)
    }
