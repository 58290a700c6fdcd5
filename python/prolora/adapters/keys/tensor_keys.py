"""Tensor keys of LoRA files: module path and role, left out, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from .codec import Codec

# Role -> what stands behind the module's path in a key. Either path.lora_A.weight, or
# path.lora.down.weight, or path_lora.down.weight (attn1.processor.to_q_lora.down.weight).
# DoRA's magnitudes in PEFT's and ai-toolkit's names go with the output axis always, others with
# either. The last three are differences of biases and normalisation layers; a LoRA's own bias has
# its scale.
_NAME = r"(?:\.default|\.[^.]+(?=\.(?:weight|bias)$))?"
"""The name that PEFT gives an adapter in memory: `to_q.lora_A.default_0.weight`."""
_SUFFIXES = {
    "down": rf"\.lora_(?:A|down){_NAME}(?:\.weight)?"
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight",
    "up": rf"\.lora_(?:B|up){_NAME}(?:\.weight)?"
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "magnitude": rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?|\.magnitude",
    "weight": r"\.w_norm",
    "bias": r"\.(?:b_norm|diff_b)",
    "scaled_bias": rf"\.lora_(?:B|up){_NAME}\.bias",
}
_PLAIN = (  # the suffix is the role
    r"hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff|oft_blocks|rescale"
    r"|dora_scale|scalar|alpha"
)
_GLORA = "a1|a2|b1|b2|bm"
_KEY = re.compile(
    r"(?P<path>.+)(?:"
    + "|".join(f"(?P<{role}>{suffix})" for role, suffix in _SUFFIXES.items())
    + rf"|\.(?P<plain>{_PLAIN})|\.(?P<glora>{_GLORA})\.weight)"
)
_ADAPTER_NAME = re.compile(r"\.lora_(?:A|B|down|up)\.(default$|[^.]+(?=\.(?:weight|bias)$))")
# Their names of modules end like a suffix.
_XLABS = re.compile(r"(?P<path>.+\.processor\.(?:qkv|proj)_lora[12]?)\.(?P<role>down|up)\.weight")

VECTORS = {"weight": "weight", "bias": "bias", "scaled_bias": "bias"}
"""Role of a difference of a vector -> the vector in its module."""

FOREIGN = "a tensor of no LoRA, or of a module that prolora does not know"
FOREIGN_VECTOR = "a trained bias or normalisation layer of a module that prolora does not know"
_REPLACED_NORM = "a normalisation layer that replaces the base model's, not an update of it"
_PACKED_EMBEDDING = "an embedding packed with the LoRA: not part of it"
NO_UPDATES = (_REPLACED_NORM, _PACKED_EMBEDDING)
"""Reasons of what is left out without a loss; all else may be an update."""
# What follows a dot, or begins the key. The first match decides.
_LEFT_OUT = (
    (r"norm\.(query_norm|key_norm)\.scale$", _REPLACED_NORM),
    (r"attn\.norm_(added_)?[qk]\.weight$", _REPLACED_NORM),
    (r"diff_m$", "a difference of a modulation table: not moved"),
    (r"(?<=^\.)bundle_emb\.|emb_params$", _PACKED_EMBEDDING),
)

_EXTRACT = (
    "Merge it into its base model and extract a plain LoRA from the difference "
    "(`extract()` does), then transfer that"
)
BOFT = "a BOFT (butterfly) adapter"
_MODULES_TO_SAVE, _BIASES = "fully trained modules (modules_to_save)", "trained biases"
# As above, as LyCORIS, PEFT and ComfyUI write them.
_REFUSED = (
    (r"(oft_diag|oft_[rR]|boft_\w+|oft)\b", "an OFT adapter other than LyCORIS' diag-OFT"),
    (
        r"(vera|hra|poly_lora|randlora|bone|miss|road|shira|waveft|fourierft|ln_tuning"
        r"|vblora|c3a|adalora|lora_E|gralora|delora|osf)(_\w+)?(\.|$)",
        "an adapter of one of PEFT's rarer methods",
    ),
    (
        r"(q_layer|p_layer|lambda_layer)(\.weight)?$",
        "a T-LoRA, whose rank depends on the time step",
    ),
    (r"bias_(indices|values|size)$", "a LyCORIS update with a sparse bias"),
    (r"set_weight$", "whole weights that replace the base model's, not an update of them"),
    (r"(lora_edit|reshape_weight)\b", "a LoRA on reshaped weights"),
    (r"on_input$", "an IA3 adapter, which scales activations"),
    (r"lora_embedding_[AB]\b", "a LoRA on an embedding table"),
    (r"modules_to_save\.", _MODULES_TO_SAVE),
    (r"(?<=^\.)base_model\.model\..+(?<!\.lora_B)\.bias$", _BIASES),
)

# Most keys are of neither kind. With the dot in front, the search skips all other letters.
_ANY_NOT_READ = re.compile(rf"\.(?:{'|'.join(pattern for pattern, _ in (*_LEFT_OUT, *_REFUSED))})")

# Files of other kinds, by a typical key.
_OTHER_KINDS = (
    (
        r"^lllite_",
        "it is a ControlNet-LLLite, which adds layers of its own and updates no weight",
    ),
    (
        r"^oft_(unet|te\d?)_",
        f"it is an OFT adapter in kohya's spelling, which prolora does not read. {_EXTRACT}",
    ),
    (
        r"clip_img_mapper|clip_txt_pooled_mapper|(down|up)_(repeat_mappers|downscalers|upscalers)\b",
        "it is a LoRA for Stable Cascade, of no family that prolora knows",
    ),
)
_BASE_ROOTS = (
    *("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner."),
    *("double_blocks.", "single_blocks.", "joint_blocks."),
)


class StoredTensor(NamedTuple):
    """An unread tensor of a LoRA and what its key means."""

    key: str
    path: str  # of the module in the file, "" for a key of no update or vector
    role: str  # of the tensor in the module's update
    dtype: str  # by its name in headers
    shape: tuple[int, ...]

    @classmethod
    def of(cls, key: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
        """Returns the tensor with a key."""
        return cls(key, *split_key(key), dtype, shape)


# A folder's LoRAs have the same keys.
@lru_cache(1 << 14)
def split_key(key: str) -> tuple[str, str]:
    """Splits a key of an update or vector into (module path, role), else ("", "")."""
    if ".processor." in key and (match := _XLABS.fullmatch(key)):
        return match["path"], match["role"]
    match = _KEY.fullmatch(key)
    if match is None:
        return "", ""
    role = match.lastgroup or ""
    return match["path"], match[role] if role in ("plain", "glora") else role


def find_adapter_name(key: str) -> str:
    """Returns the name of PEFT's adapter in a key, "default" or any other; "" without one."""
    match = _ADAPTER_NAME.search(key)
    return match[1] if match else ""


def find_unread(key: str) -> tuple[str, str]:
    """Returns why a key refuses its file, and why its tensor is left out.

    Each is "" for a key of another kind; what is left out is no reason to refuse the rest.
    """
    if not _ANY_NOT_READ.search(dotted := f".{key}"):
        return "", ""
    kind, reason = (
        next((x for pattern, x in some if re.search(rf"\.(?:{pattern})", dotted)), "")
        for some in (_REFUSED, _LEFT_OUT)
    )
    return kind, reason


def explain_refusal(where: str, key: str, what: str) -> str:
    """Explains to the user why a kind of adapter is not read."""
    way_out = (
        "Train or save the adapter without them"
        if what in (_MODULES_TO_SAVE, _BIASES)
        else _EXTRACT
    )
    return f"{where}: {key} makes this {what}, which prolora does not read. {way_out}"


def explain_other_kind(keys: Iterable[str]) -> str | None:
    """Describes in one sentence what kind of file has such keys, else None."""
    explanations = (why for key in keys for kind, why in _OTHER_KINDS if re.search(kind, key))
    return next(explanations, None)


def is_of_adapter(key: str) -> bool:
    """Returns whether a key is of any kind of adapter, read or not."""
    path, role = split_key(key)
    is_readable = role in VECTORS or (path and Codec().read(path) is not None)
    return bool(any(find_unread(key)) or is_readable)


def is_base_weight(key: str) -> bool:
    """Returns whether the key is a plain weight of a base model."""
    if not key.endswith((".weight", ".bias")) or split_key(key)[1]:
        return False
    return key.startswith(_BASE_ROOTS) or Codec().read(key.rsplit(".", 1)[0]) is not None
