"""Canonical module names <-> the module paths in keys of LoRA files.

Canonical is diffusers: `down_blocks.0.attentions.0.proj_in`, with `text_encoder.`,
`text_encoder_2.` and so on in front for text encoders; no prefix for the UNet or
transformer itself. All names are in tables: each family has its own, and UNets and text encoders
share `shared_names`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import product
from types import MappingProxyType
from typing import NamedTuple

from ...architectures.families import known_families
from ...architectures.family import SPELLINGS, AuthorsWeight, Family, Spelling
from ...architectures.identify import Model
from ...architectures.layouts import load_layout
from ...architectures.modules import (
    TEXT_ENCODERS,
    UNET_BLOCKS,
    UNET_ROOTS,
    find_component,
    is_in_adm,
    local_name,
)
from ...architectures.shared_names import CLIP, LANGUAGE_MODEL, SGM_ROOTS, T5, unet_names

_ADM_BLOCKS = ("input_blocks.N.N", "middle_block.N", "output_blocks.N.N")
_ADM_PARTS = (
    *("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"),
    *("skip_connection", "op", "conv", "norm", "qkv", "encoder_kv", "proj_out"),
)
_ADM_OUTSIDE = (
    "time_embed.N",
    "label_emb",
    "label_emb.N",
    "label_emb.N.N",
    "out.N",
    "input_blocks.0.0",
)
ADM = Family.of_names(
    "adm",
    *_ADM_OUTSIDE,
    *(f"{block}.{part}" for block, part in product(_ADM_BLOCKS, _ADM_PARTS)),
)
"""The modules of ADM networks, which have one name everywhere."""
# A module of an unknown model: something in a list of blocks.
_IN_A_LIST = re.compile(r"(?:^|\.)[A-Za-z]\w*\.\d+\.[A-Za-z][\w.\-]*")
_IN_A_LIST_UNDERSCORED = re.compile(r"[A-Za-z]\w*?_\d+_[A-Za-z]\w*")
_IDENTIFIER = re.compile(r"[A-Za-z][\w.\-]*")
# A training script's wrappers around an ADM network.
_WRAPPERS = re.compile(r"(?:(?:model|network|module|net|unet|diffusion_model)[._])*")
# Old attention processors held the four projections under names of their own.
_PROCESSOR = re.compile(r"\.processor(?=\.)")
ADAPTER = "llm_adapter."
"""Anima's adapter of text, which is a model of its own in diffusers."""
_CONDITIONER, _ADAPTER = "text_conditioner.", f"transformer.{ADAPTER}"
_PEFT = "base_model.model."
_QWEN3 = "text_encoders.qwen3_06b.transformer."


class EncoderPrefix(NamedTuple):
    """What the keys of a format begin with for one text encoder."""

    prefix: str
    format: str
    component: str  # "" for T5, whose place among the encoders depends on the model
    names: tuple[Family, ...]  # that may follow
    # What a model must have for its files to be written so; None where they are only read
    written: str | None = None


_FIRST, _SECOND, *_ = TEXT_ENCODERS
ALWAYS, ONE, SEVERAL = "", "one encoder", "several encoders"
ENCODER_PREFIXES = (
    EncoderPrefix("lora_te3_", "kohya", "", (T5,), ALWAYS),
    EncoderPrefix("lora_te_", "kohya", _FIRST, (LANGUAGE_MODEL,), ALWAYS),
    # kohya numbers text encoders where a model has several: in the SDXL family and in FLUX.
    EncoderPrefix("lora_te_", "kohya", _FIRST, (CLIP,), ONE),
    EncoderPrefix("lora_te1_", "kohya", _FIRST, (CLIP,), SEVERAL),
    EncoderPrefix("lora_te1_", "kohya", _FIRST, (LANGUAGE_MODEL,)),
    # OneTrainer counts FLUX's T5 as the second, kohya as the third.
    EncoderPrefix("lora_te2_", "kohya", _SECOND, (CLIP, LANGUAGE_MODEL, T5), ALWAYS),
    EncoderPrefix("text_encoders.t5xxl.transformer.", "comfy", "", (T5,), ALWAYS),
    EncoderPrefix("text_encoders.clip_h.transformer.", "comfy", _FIRST, (CLIP,), "clip-h"),
    EncoderPrefix("text_encoders.clip_l.transformer.", "comfy", _FIRST, (CLIP,), ALWAYS),
    EncoderPrefix("text_encoders.clip_g.transformer.", "comfy", _SECOND, (CLIP,), ALWAYS),
    EncoderPrefix(f"{_QWEN3}model.", "comfy", _FIRST, (LANGUAGE_MODEL,), "qwen3-0.6b"),
    EncoderPrefix(_QWEN3, "comfy", _FIRST, (LANGUAGE_MODEL,)),
    # OneTrainer's
    EncoderPrefix("clip_l.", "kohya", _FIRST, (CLIP,)),
    EncoderPrefix("clip_g.", "kohya", _SECOND, (CLIP,)),
    EncoderPrefix("t5.", "kohya", "", (T5,)),
)
"""All beginnings but those of diffusers and PEFT; the first that fits is written."""
_UNET_STARTS = (*UNET_ROOTS, *SGM_ROOTS)
# With the dots of LyCORIS in place of underscores, too
_ENCODER_ROWS = [
    (prefix, row)
    for row in ENCODER_PREFIXES
    for prefix in dict.fromkeys((row.prefix, row.prefix[:-1] + "."))
]
_ENCODER_STARTS = tuple(prefix for prefix, _ in _ENCODER_ROWS)


class Module(NamedTuple):
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
    unwritten: bool = False  # of a text encoder, under a name that is only read

    @property
    def modules(self) -> tuple[str, ...]:
        """The canonical modules: one, or several for a fused weight."""
        return self.matrix.parts if self.matrix else (self.name,)

    @property
    def own_spelling(self) -> Spelling | None:
        """How this module is spelled, for example by an alias.

        None if its name is the same in all spellings, and for UNets and text encoders.
        """
        if self.spelling is None or self.alike or self.described:
            return None
        return self.spelling._replace(names=self.matrix.variant) if self.matrix else self.spelling


class CutPath(NamedTuple):
    """A path in a file, cut behind its prefix."""

    prefix: str  # as it stands in the file
    rest: str  # the module's name behind it
    format: str  # as in `Module`
    component: str  # the key under which diffusers files keep the scale of this component
    dotted: bool  # the name has dots


class Codec(NamedTuple):
    """The module names of one model in files: all spellings are read, one is written."""

    # Whose names the modules of a UNet or transformer have; None where that is not known
    family: Family | None = None
    t5: str = TEXT_ENCODERS[2]  # the component that T5 is
    format: str = "diffusers"
    spelling: Spelling | None = None  # of a UNet's or transformer's modules
    # What the model has, as in `EncoderPrefix.written`
    encoders: frozenset[str] = frozenset()
    # The base's names, also with underscores -> its names; None where two are alike
    names: Mapping[str, str | None] = MappingProxyType({})

    @classmethod
    def of(cls, model: Model, family: Family | None, modules: Iterable[str] = ()) -> Codec:
        """Returns what reads the files of a model; `modules` are all its names, if known."""
        listed = next(iter(list_encoders(model)), ())
        place = next((i for i, one in enumerate(listed) if "t5" in one), None)
        if place is None:  # FLUX has two text encoders and T5 is the second; SD3 has three
            place = 2 if TEXT_ENCODERS[1] in model.encoders else 1
        names: dict[str, str | None] = {}
        for name in modules:
            plain = name.replace(".", "_")
            names[plain] = None if plain in names else name
        return cls(family, TEXT_ENCODERS[place], names=names | {name: name for name in modules})

    def read(self, path: str) -> Module | None:
        """Returns what the module path of a key means, or None if unknown.

        `path` has no suffix that says which factor it is.
        """
        module = _read(self.family, self.t5, path)
        cut = cut_prefix(path) if module is None else None
        if cut and cut.rest in self.names:
            module = _name_as_in_file(cut)
        if module and module.described and module.name in self.names:
            # Of a family that is not known, the base alone tells where the dots are.
            name = self.names[module.name] or module.name
            return module._replace(name=name, local=name)
        return module

    def write(self, name: str) -> str | None:
        """Returns the path of a module, None where the format has no name for it.

        `name` is canonical, or the authors' name of a fused weight.
        """
        if find_component(name) in TEXT_ENCODERS:
            return self._write_encoder(name)
        spelling, local = self.spelling or SPELLINGS[self.format], name
        if spelling.names != "diffusers" and self.family is not None:
            weight, other = self.find_weight(name), self.family.find_weight(name)
            if not weight and not other and (self.family.unet or self.family.find_module(name)):
                return None
            if weight:
                local = weight.name
            elif other and spelling.names == "authors":
                local = other.name
            # A module that is in no table, such as a norm, has the name it came with.
        path = spelling.prefix + (local if spelling.dotted else local.replace(".", "_"))
        return _CONDITIONER + path.removeprefix(_ADAPTER) if path.startswith(_ADAPTER) else path

    def find_weight(self, module: str) -> AuthorsWeight | None:
        """Returns the matrix that contains the rows of a canonical module in files of this codec.

        Its `name` is the name in the file. None if the file has diffusers' modules.
        """
        names = (self.spelling or SPELLINGS[self.format]).names
        if self.family is None or names == "diffusers":
            return None
        alias = self.family.find_alias(module) if names == "alias" else None
        return alias or self.family.find_weight_holding(module)

    def _write_encoder(self, name: str) -> str | None:
        component, local = find_component(name), local_name(name)
        if self.format == "diffusers":
            return name
        if self.format == "peft":
            return _PEFT + local
        for row in ENCODER_PREFIXES:
            fits = row.format == self.format and row.component in ("", component)
            written = row.written == "" or row.written in self.encoders
            if fits and written and any(names.find_module(local) for names in row.names):
                return row.prefix + (local if row.prefix[-1] == "." else local.replace(".", "_"))
        return None


def list_encoders(model: Model) -> list[tuple[str, ...]]:
    """Lists the text encoders of the models that something may be for, such as "clip-l"."""
    families = map(known_families().__getitem__, model.families or model.names)
    sizes = model.sizes or [family.layouts[0] for family in families]
    return [load_layout(size).text_encoders for size in sizes]


# Every module is named by two keys or three, and a file's model is found before its names are read.
@lru_cache(1 << 15)
def _read(family: Family | None, t5: str, path: str) -> Module | None:
    if path.startswith(_CONDITIONER):
        inside = path.removeprefix(_CONDITIONER)
        module = _read(family, t5, _ADAPTER + inside)
        return module and module._replace(prefix=_CONDITIONER, local=inside)
    cut = cut_prefix(path)
    if cut is None:
        return _find_in_encoder(path, t5)
    if family is ADM:
        return _find_in_adm(cut) or _find_in_encoder(path, t5)
    if cut.component != "unet." and family is not None and (module := _find(cut, family)):
        return module
    return _find_in_encoder(path, t5) or _find_in_unet(cut) or _describe(cut)


def read_without_family(path: str) -> Module | CutPath | None:
    """Returns a module of a UNet or text encoder, else the path to look up."""
    if path.startswith(_CONDITIONER):
        path = _ADAPTER + path.removeprefix(_CONDITIONER)
    cut = cut_prefix(path)
    module = _find_in_encoder(path, TEXT_ENCODERS[2]) or (cut and _find_in_unet(cut))
    return module or (cut if cut and cut.component != "unet." else None)


# Prefix -> format of the file, and the key under which diffusers files keep the scale of the
# component. The first that fits counts.
_PREFIXES = {
    "lora_unet_unet_": ("kohya", "transformer."),
    "lora_unet__": ("kohya", "transformer."),
    "lora_unet_model_": ("kohya", "transformer."),  # musubi-tuner's, of HiDream-O1
    "lora_unet_decoder_": ("kohya", "transformer."),  # ACE-Step's
    "lora_unet_": ("kohya", "transformer."),
    "lora_unet.": ("kohya", "transformer."),
    "lora_transformer_": ("kohya", "transformer."),
    "lora_transformer.": ("kohya", "transformer."),
    "lycoris_": ("kohya", "transformer."),
    "lycoris.": ("kohya", "transformer."),
    "model.diffusion_model.": ("comfy", "transformer."),
    "diffusion_model.model.": ("comfy", "transformer."),  # ai-toolkit's first HiDream-O1
    "diffusion_model.decoder.": ("comfy", "transformer."),  # ACE-Step's
    "diffusion_model.core.": ("comfy", "transformer."),  # SimpleTuner's, of Anima, and below
    "transformer.core.": ("diffusers", "transformer."),
    "diffusion_model.": ("comfy", "transformer."),
    "transformer.": ("diffusers", "transformer."),
    "base_model.model.": ("peft", "base_model.model."),
    "net.": ("diffusers", "transformer."),
    "model.": ("diffusers", "transformer."),  # only before what `_OF_MODEL` has
    "pipe.dit.": ("diffusers", "transformer."),  # DiffSynth-Studio names modules by its pipeline
    # An old script of PEFT's, and PixArt's
    "unet.base_model.model.": ("diffusers", "transformer."),
    "unet.": ("diffusers", "unet."),
    "": ("diffusers", ""),
}
_ANY_PREFIX = re.compile("|".join(re.escape(one) for one in _PREFIXES if one != "model."))
# HiDream-O1 is a part of its model, with names that language models have without `language_model.`
_OF_MODEL = re.compile(r"model\.(?=language_model\.|visual\.)")


@lru_cache(1 << 15)
def cut_prefix(path: str) -> CutPath | None:
    """Cuts the prefix off a UNet's or transformer's path; None for text encoders."""
    if path.startswith(("lora_te", "text_encoders.")):
        return None
    prefix, rest = _split_prefix(path)
    cut = CutPath(prefix, rest, *_PREFIXES[prefix], not prefix.endswith("_"))
    # Wrappers stand in each other: `transformer.base_model.model.`
    while cut.prefix and cut.dotted:
        inner, rest = _split_prefix(cut.rest)
        format, component = _PREFIXES[inner]
        if not inner or format == "kohya":
            break
        if cut.format == "peft" or component == "unet.":
            cut = cut._replace(format=format, component=component)
        cut = cut._replace(prefix=cut.prefix + inner, rest=rest)
    if cut.component == "unet." and not cut.rest.startswith(_UNET_STARTS):
        return cut._replace(component="transformer.")  # SimpleTuner's, of HunyuanVideo 1.5
    return cut


def _split_prefix(path: str) -> tuple[str, str]:
    """Splits a path behind the first prefix that fits; "" always does."""
    match = _OF_MODEL.match(path) or _ANY_PREFIX.match(path)
    end = match.end() if match else 0
    return path[:end], path[end:]


def _find(cut: CutPath, family: Family) -> Module | None:
    """Finds a module in the table of its family."""
    name = family.find_module(cut.rest, dotted=cut.dotted)
    if name is None and cut.dotted and ".processor." in cut.rest:
        name = family.find_module(_PROCESSOR.sub("", cut.rest))
    format = cut.format
    if name is not None:
        spelling = Spelling(cut.prefix, "diffusers", cut.dotted)
        alike = bool(family.authors) and family.is_alike(name, dotted=cut.dotted)
        return Module(name, format, cut.component, name, spelling=spelling, alike=alike)
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
    return Module(name, format, cut.component, name, True, weight, spelling)


def _describe(cut: CutPath) -> Module | None:
    """Takes a module that no known family has, under the file's name."""
    # A UNet's blocks have no modules but those of its tables.
    if cut.prefix == "unet." or cut.rest.startswith(UNET_BLOCKS):
        return None
    if cut.dotted:
        is_module = _IN_A_LIST.search(cut.rest) or (cut.prefix and _IDENTIFIER.fullmatch(cut.rest))
    else:
        is_module = _IN_A_LIST_UNDERSCORED.search(cut.rest)
    return _name_as_in_file(cut) if is_module else None


def _name_as_in_file(cut: CutPath) -> Module:
    spelling = Spelling(cut.prefix, "diffusers", cut.dotted)
    return Module(cut.rest, cut.format, cut.component, cut.rest, spelling=spelling, described=True)


def _find_in_unet(cut: CutPath) -> Module | None:
    """Finds a module of a UNet, by diffusers' or the original checkpoint's names."""
    if not cut.rest.startswith(_UNET_STARTS) or cut.prefix in ("lora_transformer_", "transformer."):
        return None
    component = "unet." if cut.component == "transformer." else cut.component
    if cut.dotted and cut.rest.split(".")[0] in UNET_ROOTS:  # with modules of rare UNets
        name = cut.rest
        if cut.format in ("diffusers", "peft"):
            name = re.sub(r"\.to_out$", ".to_out.0", _PROCESSOR.sub("", name))
        return Module(name, cut.format, component, name)
    module = _find(cut, unet_names())
    return module and Module(module.name, cut.format, component, module.name, sgm=module.sgm)


def _find_in_adm(cut: CutPath) -> Module | None:
    """Finds a module of an ADM network, under its own name."""
    match = _WRAPPERS.match(cut.rest)
    inside = cut.rest[match.end() if match else 0 :]
    name = (
        inside if cut.dotted and is_in_adm(inside) else ADM.find_module(inside, dotted=cut.dotted)
    )
    if name is None:
        return None
    spelling = Spelling(cut.prefix + cut.rest.removesuffix(inside), "diffusers", cut.dotted)
    component = cut.component if cut.component == _PEFT else "unet."
    return Module(name, cut.format, component, name, spelling=spelling, described=True)


def _find_in_encoder(path: str, t5: str) -> Module | None:
    """Finds a text encoder's module, in any spelling; `t5` is the component that T5 is."""
    for prefix, row in _ENCODER_ROWS if path.startswith(_ENCODER_STARTS) else ():
        if path.startswith(prefix):
            rest, dotted = path[len(prefix) :], prefix[-1] == "."
            if local := _find_local(rest, row.names, dotted=dotted):
                component = row.component or t5
                name, unwritten = f"{component}.{local}", row.written is None
                return Module(name, row.format, f"{component}.", local, unwritten=unwritten)
    format, prefix = ("peft", _PEFT) if path.startswith(_PEFT) else ("diffusers", "")
    rest = path.removeprefix(prefix)
    rest = _PROCESSOR.sub("", rest) if ".processor." in rest else rest
    component, _, inside = rest.partition(".")
    if component == "text_model" or rest.startswith("encoder.layers."):
        component, inside = TEXT_ENCODERS[0], rest
    elif component in TEXT_ENCODERS and inside:
        prefix = f"{component}."
    else:
        return None
    # Other models' encoders have names that no table here has.
    local = _find_local(inside, (CLIP, LANGUAGE_MODEL)) or inside
    return Module(f"{component}.{local}", format, prefix, local)


def _find_local(name: str, tables: tuple[Family, ...], *, dotted: bool = True) -> str | None:
    """Returns the canonical name of an encoder's module, without the encoder's own."""
    weights = (names.find_weight(name, dotted=dotted) for names in tables)
    return next((weight.parts[0] for weight in weights if weight), None)


def most_common_spelling(modules: Iterable[Module]) -> Spelling | None:
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
