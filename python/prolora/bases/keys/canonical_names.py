"""Which module every key of a checkpoint belongs to, and which checkpoints are refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch

from ...architectures.authors import AuthorsNames
from ...architectures.ldm import ldm_to_diffusers
from ...errors import UnsupportedFormat
from ..weights import Weight
from .float8 import apply_scales
from .fused_weights import find_authors, split_weight
from .other_models import explain_other_model
from .text_encoders import split_encoders

# What a diffusion model's keys start with where one file holds several models.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# The same where the names of diffusers follow; without them it is a part of a model of that name.
_DIFFUSERS_PREFIXES = ("unet.", "transformer.")
# What all keys of a file may start with, and what says nothing then.
_WRAPPERS = ("model.", "net.", "transformer.", "unet.")
_LDM = ("input_blocks.", "middle_block.", "output_blocks.")
_LDM_DOWNSAMPLER = re.compile(r"input_blocks\.([1-9]\d?)\.0\.op\.weight")
_DIFFUSERS = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "transformer_blocks.",
    "single_transformer_blocks.",
)

_ADAPTER = re.compile(
    r"^(?:lora_(?:unet|te\d?|transformer)_|lycoris_)"
    r"|\.(?:lora_(?:up|down|mid|A|B|magnitude_vector)|dora_scale|(?:hada|lokr)_w\d\w*)(?:\.|$)"
    r"|(?:\.|_)lora\.(?:up|down)\.|\.base_layer\."
)
_FLOATS = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}


def name_weights(
    weights: Mapping[str, Weight], where: str, *, metadata: Iterable[str] = (), strict: bool = True
) -> dict[str, Weight]:
    """Canonical module name -> weight, for all weights of two or more axes.

    Args:
        weights: all keys of the checkpoint.
        where: what messages call it.
        metadata: what the headers say of quantised layers (`quantised.METADATA_KEY`).
        strict: also refuse a file that holds no diffusion model.

    Raises:
        UnsupportedFormat: an adapter, a quantised model that is not read, a file without a
            diffusion model, or two keys for one module.
        ShapeMismatch: a fused matrix that cannot be cut as its name says.
    """
    _refuse_adapters(weights, where)
    weights = apply_scales(weights, metadata, where)
    encoders, weights = split_encoders(weights, where)
    model = _select_model(weights)
    names = _KeySpelling(model)
    if strict and not names.known and (reason := explain_other_model(model)) is not None:
        raise UnsupportedFormat(
            f"{where}: holds no UNet or transformer of a diffusion model: it {reason}"
        )
    named = _name_modules(model, names, where)
    return named | encoders


def _select_model(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The diffusion model's weights among those of a file, without the prefix that all have."""
    for prefix in _PREFIXES:
        if model := _take_prefix(weights, prefix):
            return model
    for prefix in _DIFFUSERS_PREFIXES:
        if _has_prefix(model := _take_prefix(weights, prefix), _DIFFUSERS):
            return model
    matrices = [key for key, weight in weights.items() if len(weight.shape) > 1]
    for prefix in _WRAPPERS:
        if matrices and all(key.startswith(prefix) for key in matrices):
            return _take_prefix(weights, prefix)
    return dict(weights)


def _take_prefix(weights: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    """The weights with this prefix, without it."""
    return {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}


class _KeySpelling:
    """How the keys of one checkpoint are spelled.

    Attributes:
        known: whether they are in one of the spellings at all.
    """

    def __init__(self, keys: Collection[str]) -> None:
        diffusers = _has_prefix(keys, _DIFFUSERS)
        self._ldm = _has_prefix(keys, _LDM) and not diffusers
        self._authors: AuthorsNames | None = None if diffusers else find_authors(keys)
        self._layers = _count_ldm_layers(keys) if self._ldm else 0
        self.known = diffusers or self._ldm or self._authors is not None

    def views(self, key: str, weight: Weight, where: str) -> dict[str, Weight]:
        """The modules that a key's weight holds; {} for a key of something else.

        Raises:
            UnsupportedFormat: a key inside a block that is not understood: a missing update would
                be silent, while other parts (a control branch) may well be foreign.
        """
        path = key.removesuffix(".weight")
        if self._authors is not None:
            views = split_weight(self._authors, path, weight, where)
            if views is None and key.endswith(".weight") and self._authors.is_in_block(path):
                raise UnsupportedFormat(
                    f"{where}: {key} belongs to no known module of {self._authors.title}"
                )
            return views or {}
        if self._ldm:
            module = ldm_to_diffusers(path, self._layers)
            if module is None and ".transformer_blocks." in key:
                raise UnsupportedFormat(f"{where}: {key} belongs to no known module")
            return {module: weight} if module else {}
        return {path: weight}


def _name_modules(
    model: Mapping[str, Weight], names: _KeySpelling, where: str
) -> dict[str, Weight]:
    """The weights of `model` under their module names."""
    named: dict[str, Weight] = {}
    for key, weight in model.items():
        if len(weight.shape) < 2:
            continue
        for module, view in names.views(key, weight, where).items():
            if weight.dtype not in _FLOATS:
                if key.endswith(".weight"):
                    raise UnsupportedFormat(
                        f"{where}: {key} is stored as {weight.dtype}: models quantised like this "
                        "are not read; use the fp16 or bf16 version"
                    )
                continue  # tables such as position_ids
            if module in named:
                raise UnsupportedFormat(f"{where}: {key} is a second weight for {module}")
            named[module] = view
    return named


def _count_ldm_layers(keys: Iterable[str]) -> int:
    """Layers per block: the first downsampler follows those of the first block (BK-SDM has 1)."""
    matches = (_LDM_DOWNSAMPLER.fullmatch(key) for key in keys)
    return max(1, min((int(match[1]) - 1 for match in matches if match), default=2))


def _has_prefix(keys: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in keys)


def _refuse_adapters(keys: Collection[str], where: str) -> None:
    key = next((key for key in keys if _ADAPTER.search(key)), None)
    if key is not None:
        raise UnsupportedFormat(
            f"{where}: is a LoRA or a model with one attached ({key}), not a base model; give the "
            "checkpoint it was trained on, with nothing attached"
        )
