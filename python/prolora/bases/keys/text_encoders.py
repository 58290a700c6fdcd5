"""Text encoders that lie in the same checkpoint as their model.

OpenCLIP keeps q, k and v in one matrix and its last projection transposed; both are views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...architectures.family import Family, fuse_equal
from ...architectures.modules import TEXT_ENCODER_PREFIXES
from ...architectures.shared_names import CLIP, CLIP_LAYER
from ...errors import ShapeMismatch
from ..weights import ConvertedWeight, Weight
from .family_names import cut_rows

OPEN_CLIP = Family(
    "open-clip",
    "OpenCLIP",
    (),
    {
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding",
        "transformer.resblocks.N.attn.in_proj_weight": fuse_equal(
            *(f"{CLIP_LAYER}.self_attn.{head}_proj" for head in "qkv")
        ),
        "transformer.resblocks.N.attn.out_proj": f"{CLIP_LAYER}.self_attn.out_proj",
        "transformer.resblocks.N.mlp.c_fc": f"{CLIP_LAYER}.mlp.fc1",
        "transformer.resblocks.N.mlp.c_proj": f"{CLIP_LAYER}.mlp.fc2",
    },
)
"""The names of SD2.x's encoder, and of SDXL's second, in checkpoints."""
# A single file's prefix of an encoder, its canonical prefix, and whose names follow. SDXL's are
# `conditioner.embedders`, those of SD1.x and 2.x `cond_stage_model`.
_STORED = (
    ("cond_stage_model.transformer.", "text_encoder.", CLIP),
    ("cond_stage_model.model.", "text_encoder.", OPEN_CLIP),
    ("conditioner.embedders.0.transformer.", "text_encoder.", CLIP),
    ("conditioner.embedders.1.model.", "text_encoder_2.", OPEN_CLIP),
    ("text_encoders.clip_l.transformer.", "text_encoder.", CLIP),
    ("text_encoders.clip_h.transformer.", "text_encoder.", CLIP),
    ("text_encoders.clip_g.transformer.", "text_encoder_2.", CLIP),
    *((prefix, prefix, CLIP) for prefix in TEXT_ENCODER_PREFIXES),
)
_T5 = "text_encoders.t5xxl.transformer."


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
        start, prefix, names = entry
        named = _split_weight(key.removeprefix(start), weight, names, where)
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
        start, prefix, names = entry
        local, plain = key.removeprefix(start), weight.dtype.is_floating_point
        module, _, tensor = local.rpartition(".")
        if len(weight.shape) == 1 and plain and names is not OPEN_CLIP:
            named[f"{prefix}{_find_name(module)}.{tensor}"] = weight
        elif len(weight.shape) < 2 or not plain or not _split_weight(local, weight, names, ""):
            named[key] = weight
    return named


def _find_prefixes(
    weights: Mapping[str, Weight],
) -> Iterator[tuple[str, Weight, tuple[str, str, Family] | None]]:
    """Yields each key with its weight and entry of `_STORED`, None outside text encoders.

    T5 is the last encoder: SD3 has two CLIPs before it, FLUX one, PixArt none.
    """
    clips = ("text_encoders.clip_l.", "text_encoders.clip_g.")
    before = sum(any(key.startswith(clip) for key in weights) for clip in clips)
    stored = [*_STORED, (_T5, TEXT_ENCODER_PREFIXES[before], CLIP)]
    for key, weight in weights.items():
        yield key, weight, next((entry for entry in stored if key.startswith(entry[0])), None)


def _find_name(module: str) -> str:
    """Files and LoRAs have CLIP's outer `text_model.`, which transformers 5 leaves out."""
    stored = CLIP.find_weight(module)
    return stored.parts[0] if stored else module


def _split_weight(local: str, weight: Weight, names: Family, where: str) -> dict[str, Weight]:
    """Returns the modules that one tensor of an encoder holds."""
    path = local.removesuffix(".weight")
    if names is not OPEN_CLIP:
        return {_find_name(path): weight}
    if local == "text_projection":  # features @ text_projection
        return {local: ConvertedWeight(weight, transposed=True)} if len(weight.shape) == 2 else {}
    stored = OPEN_CLIP.find_weight(path)
    if stored is None:
        return {}
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    if len(stored.parts) > 1 and (rows != 3 * columns or not rows):
        raise ShapeMismatch(
            f"{where}: {local} is {list(weight.shape)}, which is not q, k and v of equal size"
        )
    return cut_rows(stored, weight)
