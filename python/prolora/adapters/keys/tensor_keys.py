"""Tensor keys of LoRA files: module and role, left out, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...architectures.family import Family
from . import module_names

_DOWN_UP = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_down": "down",
    "lora_up": "up",
    "down": "down",
    "up": "up",
}
# Either path.lora_A.weight, or path.lora.down.weight, or path_lora.down.weight (most of all
# attn1.processor.to_q_lora.down.weight).
_FACTOR = re.compile(
    r"(?P<path>.+?)"
    r"(?:\.(?P<short>lora_A|lora_B|lora_down|lora_up)(?:\.default)?(?P<weight>\.weight)?"
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<long>down|up)\.weight)"
)
_XLABS = re.compile(
    r"(?P<path>(?:diffusion_model\.)?(?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]?)"
    r"\.(?P<role>down|up)\.weight"
)
# Every other tensor that makes up an update. The role is the suffix, but for the names that DoRA's
# magnitudes have: PEFT's and ai-toolkit's go with the output axis always, the others with either.
_PART = re.compile(
    r"(?P<path>.+?)\.(?:"
    r"(?P<lora_mid>lora_mid)\.weight"
    r"|(?P<plain>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff|oft_blocks|rescale"
    r"|dora_scale|scalar|alpha)"
    r"|(?P<glora>a1|a2|b1|b2|bm)\.weight"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?|magnitude)"
    r")"
)
# Differences of biases and normalisation layers; those of a LoRA's own bias have its scale.
_VECTOR = re.compile(
    r"(?P<path>.+?)\.(?:(?P<weight>w_norm)|(?P<bias>b_norm|diff_b)"
    r"|(?P<scaled>(?:lora_B|lora_up)(?:\.default)?\.bias))"
)


@dataclass(frozen=True)
class FactorKey:
    """A key that is understood: one tensor of one module's update."""

    module: module_names.ModulePath
    role: str  # "down", "up", "mid", "alpha", "dora_scale", "magnitude" or LyCORIS' own suffix


@dataclass(frozen=True)
class VectorKey:
    """A key of a difference to a bias or a normalisation weight."""

    module: module_names.ModulePath
    tensor: str  # "bias" or "weight"
    scaled: bool = False  # the scale of the module's update is in front of it


@dataclass(frozen=True)
class LeftOutKey:
    """A key that prolora does not move, without refusing the rest."""

    reason: str


@dataclass(frozen=True)
class RefusedKey:
    """A key of an adapter type that is not read."""

    algorithm: str  # short name of the adapter type


FOREIGN = "a tensor of no LoRA, or of a module that prolora does not know"
FOREIGN_VECTOR = "a trained bias or normalisation layer of a module that prolora does not know"
_REPLACED_NORM = "a normalisation layer that replaces the base model's, not an update of it"
_PACKED_EMBEDDING = "an embedding packed with the LoRA: not part of it"
NO_UPDATES = (_REPLACED_NORM, _PACKED_EMBEDDING)
"""Reasons of what is left out without a loss; all else may be an update."""
# The first match decides.
_LEFT_OUT = [
    (re.compile(r"\.norm\.(query_norm|key_norm)\.scale$"), _REPLACED_NORM),
    (re.compile(r"\.attn\.norm_(added_)?[qk]\.weight$"), _REPLACED_NORM),
    (re.compile(r"\.diff_m$"), "a difference of a modulation table: not moved"),
    (re.compile(r"^bundle_emb\.|(^|\.)emb_params$"), _PACKED_EMBEDDING),
]

# The first match decides. Suffixes as LyCORIS, PEFT and ComfyUI write them.
_REFUSED = [
    (re.compile(r"\.(oft_diag|oft_[rR]|boft_\w+)\b|\.oft\b"), "oft"),
    (
        re.compile(
            r"\.(vera|hra|poly_lora|randlora|bone|miss|road|shira|waveft|fourierft|ln_tuning"
            r"|vblora|c3a|adalora|lora_E|gralora|delora|osf)(_\w+)?(\.|$)"
        ),
        "other",
    ),
    (re.compile(r"\.(q_layer|p_layer|lambda_layer)(\.weight)?$"), "tlora"),
    (re.compile(r"\.bias_(indices|values|size)$"), "sparse_bias"),
    (re.compile(r"\.set_weight$"), "set"),
    (re.compile(r"\.lokr_t1$"), "lokr_t1"),
    (re.compile(r"\.on_input$"), "ia3"),
    (re.compile(r"\.lora_embedding_[AB]\b"), "embedding"),
    (re.compile(r"\.modules_to_save\."), "modules_to_save"),
    (re.compile(r"\.(lora_edit|reshape_weight)\b"), "reshaped"),
    (re.compile(r"(?<=^base_model\.model\.).+(?<!\.lora_B)\.bias$"), "bias"),
]

REASONS = {
    "oft": "an OFT adapter of a kind other than LyCORIS' diag-OFT",
    "boft": "a BOFT (butterfly) adapter",
    "other": "an adapter of one of PEFT's rarer methods",
    "tlora": "a T-LoRA, whose rank depends on the time step",
    "sparse_bias": "a LyCORIS update with a sparse bias",
    "set": "whole weights that replace the base model's, not an update of them",
    "lokr_t1": "a LoKr whose first factor is Tucker decomposed, which no tool writes",
    "ia3": "an IA3 adapter, which scales activations",
    "embedding": "a LoRA on an embedding table",
    "bias": "trained biases",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "reshaped": "a LoRA on reshaped weights",
}

_EXTRACT = (
    "Merge it into its base model and extract a plain LoRA from the difference "
    "(`extract()` does), then transfer that"
)
_LEAVE_OUT = "Train or save the adapter without them"
REMEDIES = {
    algorithm: _LEAVE_OUT if algorithm in ("bias", "modules_to_save") else _EXTRACT
    for algorithm in REASONS
}


# Files of other kinds, by a typical key.
_OTHER_KINDS = [
    (
        re.compile(r"^lllite_"),
        "It is a ControlNet-LLLite, which adds layers of its own and updates no weight",
    ),
    (
        re.compile(r"^oft_(unet|te\d?)_"),
        "It is an OFT adapter in kohya's spelling, which prolora does not read. " + _EXTRACT,
    ),
]


def explain_other_kind(keys: Iterable[str]) -> str | None:
    """Says in one sentence what kind of file has such keys, else None."""
    for key in keys:
        for pattern, reason in _OTHER_KINDS:
            if pattern.search(key):
                return reason
    return None


def parse_key(
    key: str, shape: tuple[int, ...] = (), family: Family | None = None
) -> FactorKey | VectorKey | LeftOutKey | RefusedKey | None:
    """Returns what a key says; None if it is not understood.

    Args:
        key: of a tensor.
        shape: of the tensor; it tells the difference of a vector from the difference of a matrix.
        family: whose names the modules of a transformer have, if that is known.
    """
    for pattern, algorithm in _REFUSED:
        if pattern.search(key):
            return RefusedKey(algorithm)
    for pattern, reason in _LEFT_OUT:
        if pattern.search(key):
            return LeftOutKey(reason)
    if match := _VECTOR.fullmatch(key):
        module = module_names.parse_module_path(match["path"], family)
        if module is None:
            return LeftOutKey(FOREIGN_VECTOR)
        return VectorKey(module, "weight" if match["weight"] else "bias", bool(match["scaled"]))
    path_and_role = split_role(key)
    module = module_names.parse_module_path(path_and_role[0], family) if path_and_role else None
    if path_and_role and path_and_role[1] == "diff" and len(shape) == 1:
        return VectorKey(module, "weight") if module else LeftOutKey(FOREIGN_VECTOR)
    return FactorKey(module, path_and_role[1]) if path_and_role and module else None


def split_role(key: str) -> tuple[str, str] | None:
    """Splits a key of an update into (module path, role), whatever the module."""
    if match := _PART.fullmatch(key):
        role = match["plain"] or match["glora"]
        return match["path"], role or ("mid" if match["lora_mid"] else "magnitude")
    return split_factor(key)


def find_path(key: str) -> str | None:
    """Returns the module path of a key of an update or a vector."""
    if match := _VECTOR.fullmatch(key):
        return match["path"]
    path_and_role = split_role(key)
    return path_and_role[0] if path_and_role else None


def split_factor(key: str) -> tuple[str, str] | None:
    """Splits a key of a LoRA's factor into (module path, "down" or "up")."""
    if match := _XLABS.fullmatch(key):
        return match["path"], match["role"]
    match = _FACTOR.fullmatch(key)
    return (match["path"], _DOWN_UP[match["short"] or match["long"]]) if match else None


_BASE_ROOTS = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "double_blocks.",
    "single_blocks.",
    "joint_blocks.",
)


def is_base_weight(key: str) -> bool:
    """Returns whether the key is a plain weight of a base model."""
    if not key.endswith((".weight", ".bias")) or split_role(key):
        return False
    return (
        key.startswith(_BASE_ROOTS)
        or module_names.parse_module_path(key.rsplit(".", 1)[0]) is not None
    )
