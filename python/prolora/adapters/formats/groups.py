"""Paths of updates in a file, and updates that share factors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ...architectures import loaders
from ...architectures.families import known_families, list_loaded
from ...architectures.family import KOHYA, SPELLINGS, UNET_KOHYA, AuthorsWeight, Family, Spelling
from ...architectures.layouts import load_layout
from ...architectures.modules import TEXT_ENCODER_PREFIXES, TEXT_ENCODERS, find_component, is_in_adm
from ...architectures.shared_names import find_unet_names
from ...core.grouping import group_by
from ...core.lowrank import LowRank
from ...errors import UnsupportedFormat
from .. import fused_updates, vectors
from ..adapter import Adapter
from ..keys.codec import ONE, SEVERAL, Codec, list_encoders
from . import programs


@dataclass(frozen=True)
class Group:
    """Modules that share one pair of factors: several in fused weights only.

    Put together one at a time: a fused `up` is block-diagonal and mostly zeros.
    """

    path: str  # the module's name in the keys of the file
    parts: dict[str, LowRank]  # module -> its update
    matrix: AuthorsWeight | None  # the authors' weight with these modules as rows, if any

    @property
    def rank(self) -> int:
        """Columns of the factors in the file."""
        if self.matrix:
            return fused_updates.fused_rank(self.matrix, self.parts)
        return next(iter(self.parts.values())).rank

    def update(self) -> LowRank:
        """Builds the factors in the file."""
        if self.matrix:
            return fused_updates.fuse_updates(self.matrix, self.parts)
        return next(iter(self.parts.values()))


@dataclass(frozen=True)
class FileLayout:
    """Groups and names of an adapter in a file of one format."""

    groups: list[Group]
    vectors: dict[str, Tensor]  # fused ones under the name of the fused weight
    vector_paths: dict[str, str]  # module with vectors, or such a weight -> its path


def lay_out(adapter: Adapter, format: str) -> FileLayout:
    """Finds the names that a file of a format has for all of an adapter.

    Raises:
        UnsupportedFormat: the format has no name for a module, or cannot hold a vector: diffusers
            and PEFT hold only the bias of a module that has an update too.
    """
    homeless = [name for name in adapter.vectors if not has_lora_bias(adapter, name)]
    if homeless and format in ("diffusers", "peft"):
        raise UnsupportedFormat(
            f"the {format} format has no keys for trained normalisation layers, nor for biases of "
            f"modules without an update, and this adapter has {len(homeless)}, the first: "
            f"{homeless[0]}. Write it with `format='kohya'` or `format='comfy'`"
        )
    if format == "peft":
        _check_one_component(adapter)
    codec = find_codec(adapter, format)
    fused = fused_updates.fuse_vectors(adapter.vectors, codec.find_weight)
    with_vectors = dict.fromkeys(map(vectors.find_vector_module, fused))

    def spell(name: str) -> str:
        path = codec.write(name)
        if path is None:
            raise UnsupportedFormat(
                f"{name} has no name in the {format} format; write it with `format='diffusers'`"
            )
        return path

    groups = [
        Group(
            path,
            {name: adapter.updates[name] for name in modules},
            codec.find_weight(modules[0]),
        )
        for path, modules in group_by(adapter.updates, spell).items()
    ]
    return FileLayout(groups, fused, {name: spell(name) for name in with_vectors})


def has_lora_bias(adapter: Adapter, vector: str) -> bool:
    """Returns whether the vector can be the bias of its module's second factor."""
    return vector.endswith(".bias") and vectors.find_vector_module(vector) in adapter.updates


def find_codec(adapter: Adapter, format: str) -> Codec:
    """Returns what writes the names of an adapter's modules in a format.

    Raises:
        UnsupportedFormat: no program reads this format for the family, or the family is not told
            and the names of the format depend on it.
    """
    names = _list_modules(adapter)
    families = _find_families(adapter)
    spelling, family = SPELLINGS[format], None
    if _is_unet(names):
        spelling, family = _spell_unet(adapter, format, names, families)
    elif names:
        spelling, family = _spell_transformer(adapter, format, names, families)
    facts = _list_encoder_facts(adapter, spelling, names, families)
    return Codec(family, format=format, spelling=spelling, encoders=facts)


def _spell_unet(
    adapter: Adapter, format: str, names: list[str], families: tuple[Family, ...]
) -> tuple[Spelling, Family]:
    """Returns how a file spells a UNet's modules, and their names.

    UNets of four blocks (SD1.x, SD2.x) get diffusers' names in kohya's format: kohya itself trains
    them under these, and diffusers crashes on their two-digit SGM blocks. The SDXL family gets the
    names of the original checkpoint, as kohya writes them: A1111 finds no embedding and no
    upsampler under diffusers' names, and says nothing. A UNet of unknown sizes keeps what it came
    in.
    """
    published = load_layout(families[0].layouts[0]).shapes if families else names
    table = find_unet_names(published)
    spellings = families[0].spellings if families else table.spellings
    if format not in spellings:
        raise _refuse_format(families[0], format)
    unknown = not families and format == "kohya" and adapter.spelling == "diffusers"
    return UNET_KOHYA if unknown else spellings[format], table


def _spell_transformer(
    adapter: Adapter, format: str, names: list[str], families: tuple[Family, ...]
) -> tuple[Spelling, Family | None]:
    """Returns how a file spells a transformer's modules, and by whose names.

    The spelling that the adapter came in is kept if a program reads it for this family. Diffusers'
    and PEFT's formats have the names of the model itself and need no table. In the other two, names
    of an unknown family are ComfyUI's, which only a file that came in one of them has.
    """
    style = adapter.model.spelling
    if style is not None and format == adapter.format:
        readers = [family for family in families if loaders.is_read(family, style)]
        if readers or not families:
            return style, next(iter(readers), None)
    if not families:
        has_authors_names = format in ("diffusers", "peft") or adapter.format in ("kohya", "comfy")
        if style is None or has_authors_names:
            return SPELLINGS[format], None
        raise UnsupportedFormat(
            f"the model is of no family that prolora knows, nor are its names in the {format} "
            "format; write it with `format='auto'`, in the spelling it came in"
        )
    spelled = [(one.spellings[format], one) for one in families if format in one.spellings]
    if not spelled:
        raise _refuse_format(families[0], format)
    if programs.have_other_names(spelled, format, names):
        titles = " or ".join(family.title for family in families)
        raise UnsupportedFormat(
            f"these modules can be of {titles}, which have different names in the {format} format; "
            "give the LoRA's base model, too, or write it with `format='diffusers'`"
        )
    return spelled[0]


def _refuse_format(family: Family, format: str) -> UnsupportedFormat:
    formats = " or ".join(f"`format='{spelling}'`" for spelling in family.spellings)
    return UnsupportedFormat(
        f"no program reads a LoRA for {family.title} in the {format} format; write it with "
        f"{formats}"
    )


def _list_modules(adapter: Adapter) -> list[str]:
    """Lists the modules of updates and vectors outside text encoders."""
    modules = {*adapter.updates, *map(vectors.find_vector_module, adapter.vectors)}
    return sorted(name for name in modules if find_component(name) not in TEXT_ENCODERS)


def _is_unet(names: list[str]) -> bool:
    """Returns whether modules are a UNet's, and none is of a transformer or ADM network.

    Some transformers have a `time_embedding` or `conv_in` too: beside blocks of a transformer,
    these do not belong to a UNet.
    """
    return bool(names) and not any(
        find_component(name) == "transformer" or is_in_adm(name) for name in names
    )


def _find_families(adapter: Adapter) -> tuple[Family, ...]:
    """Returns the families that an adapter can belong to; a UNet's have its very sizes.

    An ADM network shares names with UNets, and is of none of their families.
    """
    model, names = adapter.model, _list_modules(adapter)
    is_unet = _is_unet(names)
    families = map(known_families().__getitem__, model.families or (() if is_unet else model.names))
    return tuple(one for one in families if not names or one.unet == is_unet)


def respell(adapter: Adapter, format: str, spelling: Spelling | None) -> Adapter:
    """Returns an adapter that came in a format and spelling; None for the format's own."""
    return replace(adapter, format=format, origin=adapter.model._replace(spelling=spelling))


def resolve_format(adapter: Adapter, format: str) -> tuple[Adapter, str]:
    """Returns the adapter in the spelling to write, and its format.

    A named program gets what the adapter came in where it reads all of that, else what it reads
    best, which may be a spelling that none of our formats has by itself. "auto" is what the adapter
    came in; if no program reads that for this family, it is what most programs read. "kohya" means
    kohya's own names: a FLUX LoRA of OneTrainer, whose kohya format has diffusers' names, keeps
    those for "auto" only, since kohya's scripts do not know them.

    Raises:
        UnsupportedFormat: no such format or program, or one that reads no format of ours for this
            family.
    """
    modules = {*adapter.updates, *map(vectors.find_vector_module, adapter.vectors)}
    style: Spelling | None = None
    if format in loaders.known_loaders() and format not in SPELLINGS:
        ids = [family.id for family in _find_families(adapter)]
        families = list_loaded(ids, adapter.model.sizes)
        names = programs.FileNames(adapter.format, adapter.model.spelling)
        readers = programs.find_readers(families, names, modules)
        if loaders.known_loaders()[format].title in readers.whole:
            return adapter, adapter.format
        format, style = programs.choose_format(families, format, modules)
    elif format == "auto":
        best = _replace_unread(adapter, modules)
        if best is None:
            return adapter, adapter.format
        format, style = best
    elif format not in SPELLINGS:
        raise UnsupportedFormat(f"unknown format {format!r}; use auto, {', '.join(SPELLINGS)}")
    if style:
        return respell(adapter, format, style), format
    if adapter.model.spelling is not None and _list_modules(adapter) and _find_families(adapter):
        return respell(adapter, adapter.format, None), format
    return adapter, format


def _replace_unread(adapter: Adapter, modules: set[str]) -> tuple[str, Spelling | None] | None:
    """Returns what most programs read if none reads the adapter's format, else None."""
    families = _find_families(adapter)
    if not families or adapter.format == "peft":  # a folder, where the others are files
        return None
    ranked = programs.rank_formats(families, modules)
    style = adapter.model.spelling
    came = any(loaders.is_read(one, style) for one in families) if style else False
    if came or adapter.format in {format for format, spelling in ranked if spelling is None}:
        return None
    return ranked[0] if ranked else None


def _check_one_component(adapter: Adapter) -> None:
    """Refuses several components: a PEFT folder belongs to one model, and does not say to which."""
    places = {find_component(name) for name in adapter.updates}
    if "transformer" in places:
        places.discard("unet")  # see `_is_unet`
    if len(places) > 1 or places & {"text_encoder_2", "text_encoder_3"}:
        raise UnsupportedFormat(
            f"a PEFT folder holds one model, but this adapter has modules of "
            f"{', '.join(sorted(places))}; write it with `format='diffusers'` or `format='kohya'`"
        )


def _list_encoder_facts(
    adapter: Adapter, spelling: Spelling, names: list[str], families: tuple[Family, ...]
) -> frozenset[str]:
    """Lists what prefixes of text encoders depend on, as in `EncoderPrefix.written`."""
    listed = list_encoders(adapter.model) if families else []
    several = any(len(encoders) > 1 for encoders in listed)
    several = several or any(name.startswith(TEXT_ENCODER_PREFIXES[1:]) for name in adapter.updates)
    # A UNet in SGM's names is SDXL's or its student's.
    several = several or (spelling == KOHYA if _is_unet(names) else adapter.spelling == "sgm")
    widths = {
        update.shape[1]
        for name, update in adapter.updates.items()
        if name.startswith("text_encoder.") and name.endswith((".q_proj", ".k_proj", ".v_proj"))
    }
    facts = {encoder for encoders in listed for encoder in encoders} - {"clip-h"}
    facts |= {"clip-h"} if 1024 in widths else set()
    return frozenset(facts | {SEVERAL if several else ONE})
