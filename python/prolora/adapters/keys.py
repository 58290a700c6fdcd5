"""Tensor keys of LoRA files: which module, which role, or which kind of adapter it gives away."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from . import names

Role = Literal["down", "up", "alpha"]

_DOWN_UP: dict[str, Role] = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_down": "down",
    "lora_up": "up",
    "down": "down",
    "up": "up",
}
# Either path.lora_A.weight, or path.lora.down.weight, or path.to_q_lora.down.weight.
_FACTOR = re.compile(
    r"(?P<path>.+?)"
    r"(?:\.(?P<short>lora_A|lora_B|lora_down|lora_up)(?:\.default)?"
    r"|(?:\.lora|\.lora_linear_layer|(?P<processor>(?<=\.to_[qkv])_lora|(?<=\.to_out)_lora))"
    r"\.(?P<long>down|up))"
    r"\.weight"
)


@dataclass(frozen=True)
class Key:
    """A key that is understood: a factor or an alpha of one module."""

    module: names.Named
    role: Role


@dataclass(frozen=True)
class Refusal:
    """A key of an adapter type that is not a plain LoRA.

    Attributes:
        algorithm: short name of the adapter type.
        path: the module path in front of the telling suffix.
    """

    algorithm: str
    path: str


# The first match decides. Suffixes as LyCORIS, PEFT and ComfyUI write them.
_REFUSED = [
    (re.compile(r"\.lora_mid\b"), "tucker"),
    (re.compile(r"\.hada_"), "loha"),
    (re.compile(r"\.lokr_"), "lokr"),
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"), "dora"),
    (re.compile(r"\.(oft_|boft_)|\.oft\b"), "oft"),
    (re.compile(r"\.(w_norm|b_norm)$"), "norm"),
    (re.compile(r"\.(diff|diff_b|set_weight)$"), "full"),
    (re.compile(r"\.(a1|a2|b1|b2|bm)\.weight$"), "glora"),
    (re.compile(r"\.on_input$"), "ia3"),
    (re.compile(r"\.lora_embedding_[AB]\b"), "embedding"),
    (re.compile(r"\.(lora_A|lora_B|lora_down|lora_up|down|up)(\.default)?\.bias$"), "bias"),
    (re.compile(r"\.modules_to_save\."), "modules_to_save"),
    (re.compile(r"\.(lora_edit|reshape_weight)\b"), "reshaped"),
    (re.compile(r"(?<=^base_model\.model\.).+\.bias$"), "bias"),
]

REASONS = {
    "tucker": "a Tucker (CP) decomposed LoCon",
    "loha": "a LoHa (Hadamard product)",
    "lokr": "a LoKr (Kronecker product)",
    "dora": "a DoRA, whose update depends on the weights of its base model",
    "oft": "an OFT adapter, which multiplies the base weights",
    "norm": "trained normalisation layers",
    "full": "a full difference of weights, not a LoRA",
    "glora": "a GLoRA",
    "ia3": "an IA3 adapter, which scales activations",
    "embedding": "a LoRA on an embedding table",
    "bias": "trained biases",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "reshaped": "a LoRA on reshaped weights",
}

_EXTRACT = (
    "Merge it into its base model and extract a plain LoRA from the difference "
    "(kohya's extract_lora_from_models.py does), then transfer that"
)
_LEAVE_OUT = "Train or save the adapter without them"
REMEDIES = {
    algorithm: _LEAVE_OUT if algorithm in ("norm", "bias", "modules_to_save") else _EXTRACT
    for algorithm in REASONS
}


def parse(key: str) -> Key | Refusal | None:
    """What a key says; None if it is not understood."""
    for pattern, algorithm in _REFUSED:
        if match := pattern.search(key):
            return Refusal(algorithm, key[: match.start()])
    factor = split_factor(key)
    if factor is not None:
        path, role = factor
    elif key.endswith(".alpha"):
        path, role = key.removesuffix(".alpha"), "alpha"
    else:
        return None
    module = names.parse(path)
    return Key(module, role) if module else None


def split_factor(key: str) -> tuple[str, Role] | None:
    """(module path, role) of a key that ends like a factor of a LoRA, of whatever module."""
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
    """Whether the key is a plain weight of a base model."""
    if not key.endswith((".weight", ".bias")) or split_factor(key):
        return False
    return key.startswith(_BASE_ROOTS) or names.parse(key.rsplit(".", 1)[0]) is not None
