"""Canonical module names <-> the module paths in keys of LoRA files.

Canonical is diffusers: `down_blocks.0.attentions.0.proj_in`, with `text_encoder.`,
`text_encoder_2.` or `text_encoder_3.` in front for text encoders; no prefix for the UNet or
transformer itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import NamedTuple

from ...architectures.family import SPELLINGS, AuthorsWeight, Family, Spelling
from ...architectures.ldm import ADM, SGM_ROOTS, diffusers_to_ldm, ldm_to_diffusers
from ...architectures.modules import (
    TEXT_ENCODERS,
    UNET_ROOTS,
    find_component,
    is_in_adm,
    local_name,
)
from .kohya_words import restore_dots

# A module of an unknown model: something in a list of blocks.
_IN_A_LIST = re.compile(r"(?:^|\.)[A-Za-z]\w*\.\d+\.[A-Za-z][\w.\-]*")
# A UNet's blocks have no modules but those that arithmetic finds.
_UNET_BLOCKS = (
    *("down_blocks", "up_blocks", "mid_block"),
    *("input_blocks", "output_blocks", "middle_block"),
)
# A training script's wrapper around such a network.
_WRAPPED = re.compile(
    r"(?:(?:model|network|module|net|unet|diffusion_model)\.)*(?P<name>(?:[a-z]+_[a-z]+|out)(?:\..+)?)"
)
ADAPTER = "llm_adapter."
"""Anima's adapter of text, which is a model of its own in diffusers."""
_CONDITIONER, _ADAPTER = "text_conditioner.", f"transformer.{ADAPTER}"
_IDENTIFIER = re.compile(r"[A-Za-z][\w.\-]*")
_IN_A_LIST_UNDERSCORED = re.compile(r"[A-Za-z]\w*?_\d+_[A-Za-z]\w*")
_KOHYA_TEXT = re.compile(r"lora_te(\d?)([_.])(.+)")
_KOHYA_ROOTS = ("text_model", "text_projection", "layers")
_ENCODERS = {
    **dict.fromkeys(("clip_l", "clip_h", "qwen3_06b"), "text_encoder"),
    "clip_g": "text_encoder_2",
    **dict.fromkeys(("t5xxl", "t5"), "text_encoder_3"),
}
_ONETRAINER_TEXT = re.compile(r"(clip_[lg]|t5)\.(.+)")
_COMFY_TEXT = re.compile(
    r"text_encoders\.(clip_[lgh]|t5xxl|qwen3_06b)\.transformer\.(?:model\.(?=layers\.))?(.+)"
)
_PEFT = "base_model.model."
# Of a language model, as Anima's Qwen3.
_LANGUAGE_MODEL = "layers."
_T5 = re.compile(
    r"encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.w[io](?:_[01])?)"
)

# Old attention processors held the four projections under names of their own.
_PROCESSOR = re.compile(r"\.processor(?=\.)")
_CLIP_PROJECTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class ModulePath(NamedTuple):
    """What a module path in a file means."""

    name: str  # the canonical module name
    format: str  # the format with such paths: "kohya", "diffusers", "peft" or "comfy"
    # Stands before the component's own module name, e.g. "unet."; the key under which diffusers
    # files keep the scale of that component.
    prefix: str
    local: str  # the module name within its component
    # Spelled as in the original checkpoint (SGM's UNets, a transformer's authors)
    sgm: bool = False
    # The authors' weight that the path means. Where several modules are its rows, `name` is its own
    # name and not a canonical one.
    matrix: AuthorsWeight | None = None
    # How a module of a transformer is spelled; None for all others
    spelling: Spelling | None = None
    described: bool = False  # no known family has this module: `name` is the file's own
    alike: bool = False  # the family's authors and diffusers have the same name for it

    @property
    def modules(self) -> tuple[str, ...]:
        """The canonical modules: one, or several for a fused weight."""
        return self.matrix.parts if self.matrix else (self.name,)


class _Path(NamedTuple):
    """A path in a file, cut behind its prefix."""

    prefix: str  # as it stands in the file
    rest: str  # the module's name behind it
    format: str  # as in `ModulePath`
    component: str  # the key under which diffusers files keep the scale of this component
    dotted: bool  # the name has dots


def parse_module_path(
    path: str, family: Family | None = None, known: Collection[str] = ()
) -> ModulePath | None:
    """Returns what the module path of a key means, or None if unknown.

    Args:
        path: without the suffix that says which factor it is.
        family: whose names the modules of a transformer have; None where no family is known.
        known: further names of modules, which the base has.
    """
    if path.startswith(_CONDITIONER):
        inside = path.removeprefix(_CONDITIONER)
        module = parse_module_path(_ADAPTER + inside, family, known)
        return module and module._replace(prefix=_CONDITIONER, local=inside)
    cut = _cut_prefix(path)
    if cut is None:
        return _parse_text(path)
    if family is ADM:
        return _find_in_adm(cut) or _parse_text(path)
    if cut.component != "unet." and family is not None:
        module = _find_in_family(cut, family)
        if module is not None:
            return module
    return _parse_text(path) or _find_in_unet(cut) or _describe(cut, known)


def find_transformer_name(path: str) -> tuple[str, bool] | None:
    """Returns (name, has dots) for a possible module of a transformer, else None."""
    if path.startswith(_CONDITIONER):
        path = _ADAPTER + path.removeprefix(_CONDITIONER)
    cut = _cut_prefix(path)
    if cut is None or cut.component == "unet." or _parse_text(path) or _find_in_unet(cut):
        return None
    return cut.rest, cut.dotted


# Prefix, format of the file, and the key under which diffusers files keep the scale of the
# component. The first that fits counts.
_PREFIXES = (
    ("lora_unet_unet_", "kohya", "transformer."),
    ("lora_unet__", "kohya", "transformer."),
    ("lora_unet_model_", "kohya", "transformer."),  # musubi-tuner's, of HiDream-O1
    ("lora_unet_decoder_", "kohya", "transformer."),  # ACE-Step's
    ("lora_unet_", "kohya", "transformer."),
    ("lora_unet.", "kohya", "transformer."),
    ("lora_transformer_", "kohya", "transformer."),
    ("lora_transformer.", "kohya", "transformer."),
    ("lycoris_", "kohya", "transformer."),
    ("lycoris.", "kohya", "transformer."),
    ("model.diffusion_model.", "comfy", "transformer."),
    ("diffusion_model.model.", "comfy", "transformer."),  # ai-toolkit's first HiDream-O1
    ("diffusion_model.decoder.", "comfy", "transformer."),  # ACE-Step's
    ("diffusion_model.", "comfy", "transformer."),
    ("transformer.", "diffusers", "transformer."),
    ("base_model.model.", "peft", "base_model.model."),
    ("net.", "diffusers", "transformer."),
    ("pipe.dit.", "diffusers", "transformer."),  # DiffSynth-Studio names modules by its pipeline
    ("unet.", "diffusers", "unet."),
    ("", "diffusers", ""),
)


@lru_cache(1 << 13)
def _cut_prefix(path: str) -> _Path | None:
    """Cuts the prefix off a UNet's or transformer's path; None for text encoders."""
    if path.startswith(("lora_te", "text_encoders.")):
        return None
    prefix, format, component = next(one for one in _PREFIXES if path.startswith(one[0]))
    cut = _Path(prefix, path[len(prefix) :], format, component, not prefix.endswith("_"))
    # Wrappers stand in each other: `transformer.base_model.model.`
    while inner := next((x for x in _PREFIXES if x[2] and cut.rest.startswith(x[0])), None):
        if not cut.prefix or not cut.dotted or inner[1] == "kohya":
            break
        if cut.format == "peft" or inner[2] == "unet.":
            cut = cut._replace(format=inner[1], component=inner[2])
        rest = cut.rest.removeprefix(inner[0])
        cut = cut._replace(prefix=cut.prefix + inner[0], rest=rest)
    return cut


def _find_in_family(cut: _Path, family: Family) -> ModulePath | None:
    """Finds a module of a transformer in the table of its family."""
    name = family.find_module(cut.rest, dotted=cut.dotted)
    if name is None and cut.dotted:
        name = family.find_module(_PROCESSOR.sub("", cut.rest))
    format = cut.format
    if name is not None:
        spelling = Spelling(cut.prefix, "diffusers", cut.dotted)
        alike = bool(family.authors) and family.find_weight_holding(name) == (
            AuthorsWeight(name, (name,), (1,))
        )
        return ModulePath(name, format, cut.component, name, spelling=spelling, alike=alike)
    weight = family.find_weight(cut.rest, dotted=cut.dotted)
    if weight is None:
        return None
    spelling = Spelling(cut.prefix, "authors", cut.dotted)
    if format == "comfy" and ".processor." in cut.rest:
        format = "diffusers"
    elif format == "peft" and family.spellings.get("peft") != spelling:
        # The authors' names behind PEFT's prefix have no format of their own (fal's).
        format = "diffusers"
    name = weight.parts[0] if len(weight.parts) == 1 else weight.name
    return ModulePath(name, format, cut.component, name, True, weight, spelling)


def _describe(cut: _Path, known: Collection[str]) -> ModulePath | None:
    """Takes a module that no known family has, under the file's name."""
    if cut.rest in known:
        is_module = True
    elif cut.component == "unet." or cut.rest.startswith(_UNET_BLOCKS):
        is_module = False
    elif cut.dotted:
        is_named = cut.prefix and _IDENTIFIER.fullmatch(cut.rest)
        is_module = bool(_IN_A_LIST.search(cut.rest) or is_named)
    else:
        is_module = bool(_IN_A_LIST_UNDERSCORED.search(cut.rest))
    if not is_module:
        return None
    spelling = Spelling(cut.prefix, "diffusers", cut.dotted)
    return ModulePath(
        cut.rest, cut.format, cut.component, cut.rest, spelling=spelling, described=True
    )


# Every module is named by two keys or three, and a file is gone through more than once.
@lru_cache(1 << 13)
def _find_in_unet(cut: _Path) -> ModulePath | None:
    """Finds a module of a UNet, by diffusers' or the original checkpoint's names."""
    words = cut.rest if cut.dotted else restore_dots(cut.rest)
    if not words or cut.prefix in ("lora_transformer_", "transformer."):
        return None
    root = words.split(".")[0]
    component = "unet." if cut.component == "transformer." else cut.component
    format = cut.format
    if root in SGM_ROOTS:
        name = ldm_to_diffusers(words)
        return ModulePath(name, format, component, name, sgm=True) if name else None
    if root in UNET_ROOTS:
        name = words
        if format in ("diffusers", "peft"):
            name = re.sub(r"\.to_out$", ".to_out.0", _PROCESSOR.sub("", words))
        return ModulePath(name, format, component, name)
    return None


def _find_in_adm(cut: _Path) -> ModulePath | None:
    """Finds a module of an ADM network, under its own name."""
    words = cut.rest if cut.dotted else restore_dots(cut.rest)
    match = _WRAPPED.fullmatch(words) if words else None
    if match is None or not is_in_adm(match["name"]):
        return None
    prefix = cut.prefix + cut.rest[: match.start("name")]
    spelling = Spelling(prefix, "diffusers", cut.dotted)
    component = cut.component if cut.component == "base_model.model." else "unet."
    name = match["name"]
    return ModulePath(name, cut.format, component, name, spelling=spelling, described=True)


@lru_cache(1 << 13)
def _parse_text(path: str) -> ModulePath | None:
    """Reads the path of a text encoder's module, in any spelling."""
    format, prefix = "diffusers", None
    if match := _KOHYA_TEXT.fullmatch(path):
        format, number = "kohya", match[1]
        local = (restore_dots(match[3]) if match[2] == "_" else match[3]) or ""
        # OneTrainer counts FLUX's T5 as the second, kohya as the third.
        numbers = {"2": 1, "3": 2} if _T5.fullmatch(local) else {"": 0, "1": 0, "2": 1}
        known = _T5.fullmatch(local) or local.split(".")[0] in _KOHYA_ROOTS
        encoder = TEXT_ENCODERS[numbers[number]] if known and number in numbers else None
    elif match := _COMFY_TEXT.fullmatch(path) or _ONETRAINER_TEXT.fullmatch(path):
        # OneTrainer's is not "diffusers": its T5 is the third here; where it is the second,
        # `contents` corrects it.
        format, local = "comfy" if match.re is _COMFY_TEXT else "kohya", match[2]
        is_t5 = match[1] in ("t5", "t5xxl")
        encoder = _ENCODERS[match[1]] if is_t5 == bool(_T5.fullmatch(local)) else None
        if format == "kohya" and not is_t5 and not local.startswith("text_"):
            encoder = None
    else:
        if path.startswith(_PEFT):
            format, path, prefix = "peft", path.removeprefix(_PEFT), _PEFT
        path = _PROCESSOR.sub("", path)
        encoder, _, local = path.partition(".")
        if encoder == "text_model" or path.startswith("encoder.layers."):
            encoder, local, prefix = TEXT_ENCODERS[0], path, prefix or ""
        elif encoder in TEXT_ENCODERS:
            prefix = None
        else:
            return None
        local = _clip_local(local)
    if not encoder or not local:
        return None
    prefix = f"{encoder}." if prefix is None else prefix
    return ModulePath(f"{encoder}.{local}", format, prefix, local)


def _clip_local(name: str) -> str:
    """Renames a module of CLIP as CLIP's checkpoints call it.

    transformers 5 dropped the outer `text_model.` of its own modules; diffusers before 0.18 named
    the projections of text encoders like a UNet's.
    """
    name = name.removeprefix("qwen3.")  # sd-scripts' own, of Anima
    if name.startswith("encoder.layers."):
        name = f"text_model.{name}"
    head, _, tail = name.rpartition(".")
    if head.endswith(".self_attn") and tail in _CLIP_PROJECTION:
        return f"{head}.{_CLIP_PROJECTION[tail]}"
    return name


def is_t5(name: str) -> bool:
    """Returns whether a canonical name is a module of a T5 text encoder."""
    return find_component(name) in TEXT_ENCODERS and _T5.fullmatch(local_name(name)) is not None


def to_kohya(
    name: str, *, spelling: str = "diffusers", siblings: Iterable[str] = (), sdxl: bool = False
) -> str | None:
    """Returns the kohya path of a UNet's or text encoder's module, else None.

    Args:
        name: canonical.
        spelling: "diffusers" or "sgm", of UNet modules.
        siblings: other canonical names of the same model; see `ldm.diffusers_to_ldm`.
        sdxl: the model has two text encoders, which are then numbered.
    """
    where, local = find_component(name), local_name(name)
    if where == "unet":
        path = diffusers_to_ldm(local, siblings=siblings) if spelling == "sgm" else local
        return path and "lora_unet_" + path.replace(".", "_")
    if is_t5(name):
        return "lora_te3_" + local.replace(".", "_")
    if where == "text_encoder":
        numbered = sdxl and not local.startswith(_LANGUAGE_MODEL)
        return ("lora_te1_" if numbered else "lora_te_") + local.replace(".", "_")
    return "lora_te2_" + local.replace(".", "_") if where == "text_encoder_2" else None


def to_comfy(name: str, *, siblings: Iterable[str] = (), clip: str = "clip_l") -> str | None:
    """Returns ComfyUI's path of a UNet's or text encoder's module, else None.

    Args:
        name: canonical.
        siblings: other canonical names of the same model; see `ldm.diffusers_to_ldm`.
        clip: what ComfyUI calls the first text encoder: "clip_l", "clip_h" in SD2.x, "qwen3_06b" in
            Anima.
    """
    where, local = find_component(name), local_name(name)
    if where == "unet":
        path = diffusers_to_ldm(local, siblings=siblings)
        return path and f"diffusion_model.{path}"
    if is_t5(name):
        return f"text_encoders.t5xxl.transformer.{local}"
    if local.startswith(_LANGUAGE_MODEL):
        return f"text_encoders.{clip}.transformer.model.{local}" if clip == "qwen3_06b" else None
    if where == "text_encoder":
        return f"text_encoders.{clip}.transformer.{local}"
    return f"text_encoders.clip_g.transformer.{local}" if where == "text_encoder_2" else None


def spell_module(name: str, spelling: Spelling, family: Family | None) -> str | None:
    """Returns a transformer module's path in a spelling; None without an authors' name.

    Args:
        name: canonical, or the authors' name of a fused weight.
        spelling: prefix, whose names, dots or underscores.
        family: whose module it is; None for an unknown one, which has one name only.
    """
    local = name
    if spelling.names == "authors" and family is not None:
        weight = family.find_weight_holding(name) or family.find_weight(name)
        if weight is None and family.find_module(name) is not None:
            return None
        # A module that is in no table, such as a norm, has the name it came with.
        local = weight.name if weight else name
    path = spelling.prefix + (local if spelling.dotted else local.replace(".", "_"))
    return _CONDITIONER + path.removeprefix(_ADAPTER) if path.startswith(_ADAPTER) else path


def most_common_spelling(modules: Iterable[ModulePath]) -> Spelling | None:
    """Returns how most modules of a transformer are spelled, None without any.

    A module with one name everywhere does not tell whose names a file has. Where all are of that
    kind, the file has the names of its prefix's format.
    """
    spelled = [module for module in modules if module.spelling]
    counts = Counter(module.spelling for module in spelled if not module.alike)
    if counts:
        return max(counts, key=lambda one: counts[one])
    first = next((module.spelling for module in spelled), None)
    return next((one for one in SPELLINGS.values() if first and one[::2] == first[::2]), first)
