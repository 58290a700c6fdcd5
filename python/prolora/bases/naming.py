"""Which module every key of a checkpoint belongs to, and which checkpoints are refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch

from ..errors import UnsupportedFormat
from ..sgm import ldm_to_diffusers
from .base import Weight

# What a UNet's or transformer's keys start with where one file holds several models.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
_LDM = ("input_blocks.", "middle_block.", "output_blocks.")
_LDM_DOWNSAMPLER = re.compile(r"input_blocks\.([1-9]\d?)\.0\.op\.weight")
_DIFFUSERS = (
    "down_blocks.", "mid_block.", "up_blocks.", "transformer_blocks.", "single_transformer_blocks.",
)  # fmt: skip
_ORIGINAL_TRANSFORMERS = ("double_blocks.", "single_blocks.", "joint_blocks.")

_ADAPTER = re.compile(
    r"^(?:lora_(?:unet|te\d?|transformer)_|lycoris_)"
    r"|\.(?:lora_(?:up|down|mid|A|B|magnitude_vector)|dora_scale|(?:hada|lokr)_w\d\w*)(?:\.|$)"
    r"|(?:\.|_)lora\.(?:up|down)\.|\.base_layer\."
)
_QUANTISED = re.compile(
    r"(?:^|\.)(?:scaled_fp8|scale_weight|weight_scale\w*|comfy_quant|absmax|nested_absmax|quant_map"
    r"|quant_state\..*|SCB|qweight|qzeros|wscales)$"
)
_FLOATS = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip


def name_weights(
    weights: Mapping[str, Weight], where: str, *, strict: bool = True
) -> dict[str, Weight]:
    """Canonical module name -> weight, for all weights of two or more axes.

    Args:
        weights: the keys of the whole checkpoint.
        where: what messages call it.
        strict: also refuse names that belong to no UNet or transformer.

    Raises:
        UnsupportedFormat: an adapter, a quantised model, a spelling that is not read, or two keys
            for one module.
    """
    _refuse_adapters(weights, where)
    prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in weights)), "")
    model = {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}
    if prefix in ("unet.", "transformer.") and not _has(model, _DIFFUSERS):
        model = dict(weights)  # a model of another kind, with a part of that name
    _refuse_quantised(model, where)
    if _has(model, _ORIGINAL_TRANSFORMERS):
        raise UnsupportedFormat(
            f"{where}: FLUX and SD3 checkpoints in their authors' spelling are not supported yet; "
            "use the diffusers folder of this model"
        )
    is_ldm = _has(model, _LDM) and not _has(model, _DIFFUSERS)
    if strict and not is_ldm and not _has(model, _DIFFUSERS):
        raise UnsupportedFormat(
            f"{where}: holds no UNet or transformer that is known; it starts with "
            f"{', '.join(list(weights)[:3]) or 'nothing'}"
        )
    return _canonical(model, is_ldm, where)


def _canonical(model: Mapping[str, Weight], is_ldm: bool, where: str) -> dict[str, Weight]:
    """The weights of `model` under their module names."""
    named: dict[str, Weight] = {}
    layers = _ldm_layers(model)
    for key, weight in model.items():
        if len(weight.shape) < 2:
            continue
        module: str | None = key.removesuffix(".weight")
        if is_ldm:
            module = ldm_to_diffusers(key.removesuffix(".weight"), layers)
        if module is None:
            # Other parts may well be foreign (a control branch); a missing update would be silent.
            if ".transformer_blocks." in key:
                raise UnsupportedFormat(f"{where}: {key} belongs to no known module")
            continue
        if weight.dtype not in _FLOATS:
            if key.endswith(".weight"):
                raise UnsupportedFormat(
                    f"{where}: {key} is stored as {weight.dtype}: quantised models are not "
                    "supported yet; use the fp16 or bf16 version"
                )
            continue  # tables such as position_ids
        if module in named:
            raise UnsupportedFormat(f"{where}: {key} is a second weight for {module}")
        named[module] = weight
    return named


def _ldm_layers(keys: Iterable[str]) -> int:
    """Layers per block: the first downsampler follows those of the first block (BK-SDM has 1)."""
    matches = (_LDM_DOWNSAMPLER.fullmatch(key) for key in keys)
    return max(1, min((int(match[1]) - 1 for match in matches if match), default=2))


def _has(keys: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in keys)


def _refuse_adapters(keys: Collection[str], where: str) -> None:
    key = next((key for key in keys if _ADAPTER.search(key)), None)
    if key is not None:
        raise UnsupportedFormat(
            f"{where}: is a LoRA or a model with one attached ({key}), not a base model; give the "
            "checkpoint it was trained on, with nothing attached"
        )


def _refuse_quantised(keys: Collection[str], where: str) -> None:
    key = next((key for key in keys if _QUANTISED.search(key)), None)
    if key is not None:
        raise UnsupportedFormat(
            f"{where}: a quantised checkpoint ({key}); its numbers mean nothing without their "
            "scales, which are not read yet: use the fp16, bf16 or plain fp8 version"
        )
