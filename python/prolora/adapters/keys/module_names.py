"""Canonical module names <-> the module paths that LoRA files use in their keys.

Canonical is diffusers: `down_blocks.0.attentions.0.proj_in`, with `text_encoder.`,
`text_encoder_2.` or `text_encoder_3.` in front for text encoders; no prefix for the UNet or
transformer itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ...architectures import flux
from ...architectures.ldm import SGM_ROOTS, diffusers_to_ldm, ldm_to_diffusers
from ...architectures.modules import TEXT_ENCODERS, UNET_ROOTS, find_component, local_name
from .kohya_words import restore_dots

# Of diffusers' transformers (FLUX, SD3, PixArt), for keys that come without a prefix.
_TRANSFORMER_ROOTS = frozenset(
    {
        "transformer_blocks",
        "single_transformer_blocks",
        "x_embedder",
        "context_embedder",
        "time_text_embed",
        "norm_out",
        "proj_out",
        "pos_embed",
        "adaln_single",
        "caption_projection",
    }
)

_KOHYA_TEXT = re.compile(r"lora_te(\d?)([_.])(.+)")
# OneTrainer's own spelling of text encoders.
_ONETRAINER_TEXT = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
}
_COMFY_TEXT = {
    "clip_l": "text_encoder",
    "clip_h": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5xxl": "text_encoder_3",
}
_COMFY_TEXT_PATH = re.compile(r"text_encoders\.(clip_[lgh]|t5xxl)\.transformer\.(.+)")
_T5 = re.compile(
    r"encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.w[io](?:_[01])?)"
)

# Old attention processors held the four projections under names of their own.
_PROCESSOR = re.compile(r"\.processor(?=\.)")
_CLIP_PROJECTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class ModulePath(NamedTuple):
    """What a module path in a file means.

    Attributes:
        name: the canonical module name.
        format: the family that writes such paths: "kohya", "diffusers", "peft" or "comfy".
        prefix: what stands before the component's own module name, e.g. "unet."; the key under
            which diffusers files keep the scale of that component.
        local: the module name within its component.
        sgm: the path is spelled as in the original checkpoint (SGM's UNets, FLUX).
        matrix: the FLUX weight the path means. Where several modules are its rows, `name` is its
            own name and not a canonical one.
    """

    name: str
    format: str
    prefix: str
    local: str
    sgm: bool = False
    matrix: flux.FluxWeight | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """The canonical modules: one, but for a fused weight."""
        return self.matrix.parts if self.matrix else (self.name,)


def parse_path(path: str) -> ModulePath | None:
    """What the module path of a key means, or None if it is not understood."""
    if path.startswith(("lora_", "lycoris_")):
        return _from_kohya(path)
    path = path.removeprefix("model.") if path.startswith("model.diffusion_model.") else path
    if path.startswith(("diffusion_model.", "text_encoders.")):
        return _from_comfy(path)
    return _from_dotted(path)


def _from_kohya(path: str) -> ModulePath | None:
    """`lora_unet_down_blocks_0_…`; OneTrainer also keeps the dots: `lora_unet.down_blocks.0.…`."""
    if match := _KOHYA_TEXT.fullmatch(path):
        words = restore_dots(match[3]) if match[2] == "_" else match[3]
        return _from_kohya_text(match[1], words) if words else None
    for start in ("lora_unet", "lora_transformer", "lycoris"):
        rest = path.removeprefix(start)
        if start == "lora_unet" and rest.startswith("_unet_"):  # some tools write it twice
            rest = rest.removeprefix("_unet")
        if rest != path and rest[:1] in ("_", "."):
            words = restore_dots(rest[1:]) if rest[0] == "_" else rest[1:]
            return _from_words(words, start) if words else None
    return None


def _from_words(words: str, start: str) -> ModulePath | None:
    """A module of a UNet or transformer, from `lora_unet_…` and its kin."""
    root = words.split(".")[0]
    if start != "lora_transformer":
        if root in SGM_ROOTS:
            name = ldm_to_diffusers(words)
            return ModulePath(name, "kohya", "unet.", name, sgm=True) if name else None
        if matrix := flux.find_flux_weight(words):
            return _flux_path(matrix, "kohya")
        if root in UNET_ROOTS:
            return ModulePath(words, "kohya", "unet.", words)
    if root in _TRANSFORMER_ROOTS:
        return ModulePath(words, "kohya", "transformer.", words)
    return None


def _from_kohya_text(number: str, words: str) -> ModulePath | None:
    """A module of a text encoder; OneTrainer counts FLUX's T5 as the second, kohya as the third."""
    is_t5 = _T5.fullmatch(words) is not None
    if not is_t5 and words.split(".")[0] not in ("text_model", "text_projection"):
        return None
    numbers = {"2": 2, "3": 3} if is_t5 else {"": 1, "1": 1, "2": 2}
    if number not in numbers:
        return None
    encoder = TEXT_ENCODERS[numbers[number] - 1]
    return ModulePath(f"{encoder}.{words}", "kohya", f"{encoder}.", words)


def _flux_path(matrix: flux.FluxWeight, format: str, prefix: str = "transformer.") -> ModulePath:
    """A weight of FLUX in its original spelling; a single part goes by its canonical name."""
    name = matrix.parts[0] if len(matrix.parts) == 1 else matrix.name
    return ModulePath(name, format, prefix, name, sgm=True, matrix=matrix)


def _from_comfy(path: str) -> ModulePath | None:
    if path.startswith("diffusion_model."):
        path = path.removeprefix("diffusion_model.")
        if matrix := flux.find_flux_weight(path):
            return _flux_path(matrix, "diffusers" if ".processor." in path else "comfy")
        name = ldm_to_diffusers(path)
        if name:
            return ModulePath(name, "comfy", "unet.", name, sgm=True)
        # Some trainers put diffusers' names behind ComfyUI's prefix.
        root = path.split(".")[0]
        if root in UNET_ROOTS:
            return ModulePath(path, "comfy", "unet.", path)
        known = root in _TRANSFORMER_ROOTS
        return ModulePath(path, "comfy", "transformer.", path) if known else None
    match = _COMFY_TEXT_PATH.fullmatch(path)
    if not match or (match[1] == "t5xxl") != bool(_T5.fullmatch(match[2])):
        return None
    encoder = _COMFY_TEXT[match[1]]
    return ModulePath(f"{encoder}.{match[2]}", "comfy", f"{encoder}.", match[2])


def _from_dotted(path: str) -> ModulePath | None:
    family, outer = "diffusers", ""
    if path.startswith("base_model.model."):
        family, outer = "peft", "base_model.model."
        path = path.removeprefix(outer)
    if matrix := flux.find_flux_weight(path.removeprefix("transformer.")):
        # `proj_out` and the like are diffusers' names too, and never get here. The authors' own
        # spelling has no file format of its own: such a LoRA is written as diffusers writes it.
        return _flux_path(matrix, "diffusers", outer)
    path = _PROCESSOR.sub("", path)
    root, _, rest = path.partition(".")
    if root in _ONETRAINER_TEXT:
        is_t5 = _T5.fullmatch(rest) is not None
        if is_t5 != (root == "t5") or not (is_t5 or rest.startswith("text_")):
            return None
        encoder = _ONETRAINER_TEXT[root]
        # Not "diffusers": its T5 is the third, and `contents` makes it the second where it is that.
        return ModulePath(f"{encoder}.{rest}", "kohya", f"{encoder}.", rest)
    if root in TEXT_ENCODERS and rest:
        local = _clip_local(rest)
        return ModulePath(f"{root}.{local}", family, f"{root}.", local)
    if root == "unet":
        if rest.split(".")[0] in SGM_ROOTS:
            name = ldm_to_diffusers(rest)
            return ModulePath(name, family, "unet.", name, sgm=True) if name else None
        known = rest.split(".")[0] in UNET_ROOTS
        return ModulePath(_unet_local(rest), family, "unet.", _unet_local(rest)) if known else None
    if root == "transformer":
        return ModulePath(rest, family, "transformer.", rest) if rest else None
    if root in UNET_ROOTS:
        return ModulePath(_unet_local(path), family, outer, _unet_local(path))
    if root in SGM_ROOTS:  # OneTrainer's "original" format
        name = ldm_to_diffusers(path)
        return ModulePath(name, family, outer, name, sgm=True) if name else None
    if root in _TRANSFORMER_ROOTS:
        return ModulePath(path, family, outer, path)
    if root == "text_model" or path.startswith("encoder.layers."):
        local = _clip_local(path)
        return ModulePath(f"text_encoder.{local}", family, outer, local)
    return None


def _unet_local(name: str) -> str:
    """`…attn1.to_out` of an attention processor is the linear layer `…attn1.to_out.0`."""
    return f"{name}.0" if name.endswith(".to_out") else name


def _clip_local(name: str) -> str:
    """A module of CLIP as its checkpoints call it.

    transformers 5 dropped the outer `text_model.` of its own modules; diffusers before 0.18 named
    the projections of text encoders as those of a UNet.
    """
    if name.startswith("encoder.layers."):
        name = f"text_model.{name}"
    head, _, tail = name.rpartition(".")
    if head.endswith(".self_attn") and tail in _CLIP_PROJECTION:
        return f"{head}.{_CLIP_PROJECTION[tail]}"
    return name


def is_t5(name: str) -> bool:
    """Whether a canonical name is a module of a T5 text encoder."""
    return find_component(name) in TEXT_ENCODERS and _T5.fullmatch(local_name(name)) is not None


def to_kohya(
    name: str, *, spelling: str = "diffusers", siblings: Iterable[str] = (), sdxl: bool = False
) -> str | None:
    """The kohya path of a module (`lora_unet_…`), or None if kohya has no name for it.

    Args:
        name: canonical, or of a fused FLUX weight.
        spelling: "diffusers" or "sgm", of UNet and transformer modules.
        siblings: other canonical names of the same model; see `ldm.diffusers_to_ldm`.
        sdxl: the model has two text encoders, which are then numbered.
    """
    where, local = find_component(name), local_name(name)
    if where == "unet":
        path = diffusers_to_ldm(local, siblings=siblings) if spelling == "sgm" else local
        return path and "lora_unet_" + path.replace(".", "_")
    if where == "transformer":
        if spelling == "sgm":
            matrix = flux.find_flux_weight(name) or flux.find_weight_holding(name)
            return "lora_unet_" + matrix.name.replace(".", "_") if matrix else None
        path = "lora_transformer_" + local.replace(".", "_")
        return path if parse_path(path) else None
    if is_t5(name):
        return "lora_te3_" + local.replace(".", "_")
    if where == "text_encoder":
        return ("lora_te1_" if sdxl else "lora_te_") + local.replace(".", "_")
    return "lora_te2_" + local.replace(".", "_") if where == "text_encoder_2" else None


def to_diffusers(name: str) -> str:
    """The diffusers path of a module: `unet.…`, `transformer.…`, `text_encoder.…`."""
    return f"{find_component(name)}.{local_name(name)}"


def to_comfy(name: str, *, siblings: Iterable[str] = (), clip: str = "clip_l") -> str | None:
    """The path of a module in ComfyUI's own spelling, or None if it has none.

    Args:
        name: canonical, or of a fused FLUX weight.
        siblings: other canonical names of the same model; see `ldm.diffusers_to_ldm`.
        clip: what ComfyUI calls the first text encoder: "clip_l", or "clip_h" in SD2.x.
    """
    where, local = find_component(name), local_name(name)
    if where == "unet":
        path = diffusers_to_ldm(local, siblings=siblings)
        return path and f"diffusion_model.{path}"
    if where == "transformer":
        matrix = flux.find_flux_weight(name) or flux.find_weight_holding(name)
        return f"diffusion_model.{matrix.name}" if matrix else None
    if is_t5(name):
        return f"text_encoders.t5xxl.transformer.{local}"
    if where == "text_encoder":
        return f"text_encoders.{clip}.transformer.{local}"
    return f"text_encoders.clip_g.transformer.{local}" if where == "text_encoder_2" else None
