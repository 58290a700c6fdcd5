"""The module of every key of a checkpoint, and the checkpoints refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch

from ...architectures.identify import explain_adapter
from ...architectures.shared_names import is_adm, unet_names
from ...errors import UnsupportedFormat
from ..quantised.joining import join_quantised
from ..quantised.parts import Metadata
from ..weights import Weight
from .family_names import FamilyNames, find_family_names
from .other_models import explain_no_blocks, explain_other_model
from .text_encoders import name_encoder_vectors, split_encoders

# The start of a diffusion model's keys where one file holds several models.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# The same where the names of diffusers follow; without them it is a part of a model of that name.
_DIFFUSERS_PREFIXES = ("unet.", "transformer.")
# A common start of all keys of a file, without a meaning.
_WRAPPERS = ("model.", "net.", "transformer.", "unet.", "network.", "module.")
_LDM = ("input_blocks.", "middle_block.", "output_blocks.")
_LDM_DOWNSAMPLER = re.compile(r"input_blocks\.([1-9]\d?)\.0\.op\.weight")
_UNET = ("down_blocks.", "mid_block.", "up_blocks.")
_DIFFUSERS = (*_UNET, "transformer_blocks.", "single_transformer_blocks.")

_FLOATS = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}


def name_weights(
    weights: Mapping[str, Weight],
    where: str,
    *,
    metadata: Iterable[Metadata] = (),
    strict: bool = True,
) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """Returns the weights of two or more axes by canonical module, and all by key.

    In both, the parts of quantised weights are joined.

    `metadata` is of the headers, which may say how layers are quantised; `strict` also refuses a
    file that holds no diffusion model.

    Raises:
        UnsupportedFormat: an adapter, a quantised model that is not read, a file without a
            diffusion model, or two keys for one module.
        ShapeMismatch: a fused matrix that cannot be cut as its name says.
    """
    if of_adapter := explain_adapter(weights):
        raise UnsupportedFormat(f"{where}: {of_adapter}")
    stored = join_quantised(weights, metadata, where)
    encoders, rest = split_encoders(stored, where)
    model = _select_model(rest)
    names = _KeySpelling(model)
    reason = names.explain_unknown(model) if strict else None
    if reason is not None:
        raise UnsupportedFormat(
            f"{where}: holds no UNet or transformer of a diffusion model: it {reason}"
        )
    named = _name_modules(model, names, where)
    return named | encoders, stored


def name_others(weights: Mapping[str, Weight]) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """Returns what `name_weights` leaves out: of the model, and of other models.

    Biases and norms of known modules are called "module.bias" and "module.weight", all others by
    their own keys.
    """
    rest = split_encoders(weights, "")[1]
    model = _select_model(rest)
    names = _KeySpelling(model)
    named = name_encoder_vectors(weights)
    for key, weight in model.items():
        path, _, tensor = key.rpartition(".")
        plain = weight.dtype in _FLOATS
        if len(weight.shape) > 1 and plain and names.views(key, weight, ""):
            continue
        is_vector = len(weight.shape) == 1 and plain and tensor in ("bias", "weight")
        views = names.vector_views(path, weight) if is_vector else {}
        named |= {f"{module}.{tensor}": view for module, view in views.items()} or {key: weight}
    own = {id(weight) for weight in model.values()}
    return named, {key: weight for key, weight in rest.items() if id(weight) not in own}


def _select_model(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Selects the diffusion model's weights in a file and strips common prefixes."""
    for prefix in _PREFIXES:
        if model := _take_prefix(weights, prefix):
            return _unwrap(model)  # `model.diffusion_model.net.`, Anima's
    for prefix in _DIFFUSERS_PREFIXES:
        if _has_prefix(model := _take_prefix(weights, prefix), _DIFFUSERS):
            return model
    return _unwrap(weights)


def _unwrap(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Strips a prefix without meaning if all matrices have it.

    The head for words of a language model does not count: HiDream-O1 has one that nothing runs.
    """
    if "decoder.layers.0.cross_attn.q_proj.weight" in weights:  # ACE-Step, encoders beside it
        return _take_prefix(weights, "decoder.")
    matrices = [k for k, w in weights.items() if len(w.shape) > 1 and k != "lm_head.weight"]
    for prefix in _WRAPPERS:
        if matrices and all(key.startswith(prefix) for key in matrices):
            return _take_prefix(weights, prefix)
    return dict(weights)


def _take_prefix(weights: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    return {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}


class _KeySpelling:
    """How the keys of one checkpoint are spelled."""

    def __init__(self, model: Mapping[str, Weight]) -> None:
        unet = _has_prefix(model, _UNET)
        numbered = _has_prefix(model, _LDM) and not unet
        shapes = {
            key.removesuffix(".weight"): weight.shape
            for key, weight in model.items()
            if len(weight.shape) > 1
        }
        names = None if unet or numbered else find_family_names(shapes)
        if numbered and not is_adm(model):
            names = FamilyNames(unet_names(_count_ldm_layers(model)), by_authors=True)
        self._authors = names if names and names.by_authors else None
        self._in_blocks = names is not None and any(map(names.has_block, shapes))
        self._plain = unet or numbered or _has_prefix(model, _DIFFUSERS)

    def explain_unknown(self, keys: Collection[str]) -> str | None:
        """Describes what keys are that do not belong to a diffusion model."""
        if self._plain:
            return None
        reason = explain_other_model(keys)
        return reason if reason or self._in_blocks else explain_no_blocks(keys)

    def views(self, key: str, weight: Weight, where: str) -> dict[str, Weight]:
        """Returns the modules that a key's weight holds; {} for foreign keys.

        Raises:
            UnsupportedFormat: a key inside a block that is not understood: a missing update would
                be silent, while other parts (a control branch) may well be foreign.
        """
        path = key.removesuffix(".weight")
        if self._authors is not None:
            views = self._authors.split_weight(path, weight, where)
            if views is None and key.endswith(".weight") and self._authors.has_block(path):
                raise UnsupportedFormat(
                    f"{where}: {key} belongs to no known module of {self._authors.family.title}"
                )
            return views or {}
        return {path: weight}

    def vector_views(self, path: str, vector: Weight) -> dict[str, Weight]:
        """Returns the modules of a vector, each with its rows; {} if unknown."""
        if self._authors is not None:
            return self._authors.split_vector(path, vector)
        return {path: vector}


def _name_modules(
    model: Mapping[str, Weight], names: _KeySpelling, where: str
) -> dict[str, Weight]:
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
    """Counts layers per block, 1 in BK-SDM: the first downsampler ends the first block."""
    matches = (_LDM_DOWNSAMPLER.fullmatch(key) for key in keys)
    return max(1, min((int(match[1]) - 1 for match in matches if match), default=2))


def _has_prefix(keys: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in keys)
