"""Paths of updates in a file, and updates that share factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...architectures import loaders
from ...architectures.depth import ONE_LAYER_UNETS
from ...architectures.families import known_families
from ...architectures.family import KOHYA, SPELLINGS, AuthorsWeight, Family, Spelling
from ...architectures.modules import TEXT_ENCODERS, find_component, is_in_adm, local_name
from ...core.grouping import group_by
from ...core.lowrank import LowRank
from ...errors import UnsupportedFormat
from .. import fused_updates, vectors
from ..adapter import Adapter
from ..keys import module_names
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
    def modules(self) -> list[str]:
        """The names of the parts."""
        return list(self.parts)

    @property
    def rank(self) -> int:
        """Columns of the factors in the file."""
        return (
            fused_updates.fused_rank(self.matrix, self.parts) if self.matrix else self._first.rank
        )

    def update(self) -> LowRank:
        """Builds the factors in the file."""
        return fused_updates.fuse_updates(self.matrix, self.parts) if self.matrix else self._first

    @property
    def _first(self) -> LowRank:
        return self.parts[self.modules[0]]


@dataclass(frozen=True)
class FileLayout:
    """Groups and names of an adapter in a file of one format."""

    groups: list[Group]
    # Module with vectors, fused weights under their own name -> its path
    vector_paths: dict[str, str]
    authors: Family | None  # whose fused weights the file has


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
    spelling, family = _find_spelling(adapter, format)
    authors = family if spelling and spelling.names == "authors" else None
    fused = vectors.fuse_vectors(adapter.vectors, authors)
    with_vectors = dict.fromkeys(map(vectors.find_vector_module, fused))
    spell = _spell_by(adapter, format, [*adapter.updates, *with_vectors], spelling, family)
    groups = [
        Group(
            path,
            {name: adapter.updates[name] for name in modules},
            authors.find_weight_holding(modules[0]) if authors else None,
        )
        for path, modules in group_by(adapter.updates, spell).items()
    ]
    return FileLayout(groups, {name: spell(name) for name in with_vectors}, authors)


def has_lora_bias(adapter: Adapter, vector: str) -> bool:
    """Returns whether the vector can be the bias of its module's second factor."""
    return vector.endswith(".bias") and vectors.find_vector_module(vector) in adapter.updates


def _spell_by(
    adapter: Adapter,
    format: str,
    modules: list[str],
    spelling: Spelling | None,
    family: Family | None,
) -> Callable[[str], str]:
    """Returns what spells a module in a format; `spelling` and `family` are a transformer's."""
    guess = adapter.model.family
    kohya = _kohya_spelling(adapter)
    # kohya numbers text encoders where a model has several: in the SDXL family and in FLUX.
    sdxl = kohya == "sgm" or _has_several_text_encoders(adapter)
    clip = "clip_h" if _text_width(adapter) == 1024 else "clip_l"
    clip = "qwen3_06b" if guess == "cosmos" else clip
    two_layers = guess not in ONE_LAYER_UNETS

    def spell(name: str) -> str:
        path: str | None
        if spelling is not None and find_component(name) not in TEXT_ENCODERS:
            path = module_names.spell_module(name, spelling, family)
        elif format == "kohya":
            path = module_names.to_kohya(name, spelling=kohya, siblings=modules, sdxl=sdxl)
        elif format == "comfy":
            path = module_names.to_comfy(name, siblings=modules, clip=clip) if two_layers else None
        elif format == "diffusers":
            path = f"{find_component(name)}.{local_name(name)}"
        else:
            path = f"base_model.model.{local_name(name)}"
        if path is None:
            raise UnsupportedFormat(
                f"{name} has no name in the {format} format; write it with `format='diffusers'`"
            )
        return path

    return spell


def _find_spelling(adapter: Adapter, format: str) -> tuple[Spelling | None, Family | None]:
    """Returns how a file spells an adapter's transformer, and by whose names; None without one.

    The spelling that the adapter came in is kept if a program reads it for this family. Diffusers'
    and PEFT's formats have the names of the model itself and need no table. In the other two, names
    of an unknown family are ComfyUI's, which only a file that came in one of them has.

    Raises:
        UnsupportedFormat: no program reads this format for the family, or the family is not told
            and the names of the format depend on it.
    """
    names, style = _transformer_names(adapter), adapter.style
    if not names:
        return None, None
    families = _find_families(adapter)
    if style is not None and format == adapter.format:
        readers = [family for family in families if loaders.is_read(family, style)]
        if readers or not families:
            return style, next(iter(readers), None)
    if not families:
        known = format in ("diffusers", "peft") or adapter.format in ("kohya", "comfy")
        if style is None or known:
            return SPELLINGS[format], None
        raise UnsupportedFormat(
            f"the model is of no family that prolora knows, nor are its names in the {format} "
            "format; write it with `format='auto'`, in the spelling it came in"
        )
    spelled = [(one.spellings[format], one) for one in families if format in one.spellings]
    if not spelled:
        formats = " or ".join(f"`format='{known}'`" for known in families[0].spellings)
        raise UnsupportedFormat(
            f"no program reads a LoRA for {families[0].title} in the {format} format; write it "
            f"with {formats}"
        )
    paths = {tuple(module_names.spell_module(name, *one) for name in names) for one in spelled}
    if len(paths) > 1:
        titles = " or ".join(family.title for family in families)
        raise UnsupportedFormat(
            f"these modules can be of {titles}, which have different names in the {format} format; "
            "write it with `format='diffusers'`"
        )
    return spelled[0]


def _transformer_names(adapter: Adapter) -> list[str]:
    """Lists an adapter's modules of a transformer or ADM network, with vectors.

    Some transformers have a `time_embedding` or `conv_in` too: beside blocks of a transformer,
    these do not belong to a UNet.
    """
    modules = {*adapter.updates, *map(vectors.find_vector_module, adapter.vectors)}
    names = sorted(name for name in modules if find_component(name) not in TEXT_ENCODERS)
    is_ours = any(find_component(name) == "transformer" or is_in_adm(name) for name in names)
    return names if is_ours else []


def _find_families(adapter: Adapter) -> tuple[Family, ...]:
    """Returns the families that an adapter can belong to; a UNet's have its very sizes."""
    model = adapter.model
    ids = model.families or (model.names if _transformer_names(adapter) else ())
    return tuple(known_families()[id_] for id_ in ids)


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
        families = [family.id for family in _find_families(adapter)]
        readers = programs.find_readers(families, adapter.format, adapter.style, modules)
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
    names = _transformer_names(adapter)
    if adapter.style is not None and names and _find_families(adapter):
        return respell(adapter, adapter.format, None), format
    return adapter, format


def _replace_unread(adapter: Adapter, modules: set[str]) -> tuple[str, Spelling | None] | None:
    """Returns what most programs read if none reads the adapter's format, else None."""
    families = _find_families(adapter)
    if not families or adapter.format == "peft":  # a folder, where the others are files
        return None
    ranked = programs.rank_formats(families, modules)
    style = adapter.style
    came = any(loaders.is_read(one, style) for one in families) if style else False
    if came or adapter.format in {format for format, spelling in ranked if spelling is None}:
        return None
    return ranked[0] if ranked else None


def _check_one_component(adapter: Adapter) -> None:
    """Refuses several components: a PEFT folder belongs to one model, and does not say to which."""
    places = {find_component(name) for name in adapter.updates}
    if "transformer" in places:
        places.discard("unet")  # see `_transformer_names`
    if len(places) > 1 or places & {"text_encoder_2", "text_encoder_3"}:
        raise UnsupportedFormat(
            f"a PEFT folder holds one model, but this adapter has modules of "
            f"{', '.join(sorted(places))}; write it with `format='diffusers'` or `format='kohya'`"
        )


def _kohya_spelling(adapter: Adapter) -> str:
    """Returns the spelling of a UNet's modules: the adapter's, with two exceptions.

    UNets of four blocks (SD1.x, SD2.x) get diffusers' names: kohya itself trains them under these,
    and diffusers crashes on their two-digit SGM blocks. The SDXL family gets the names of the
    original checkpoint, as kohya writes them: A1111 finds no embedding and no upsampler under
    diffusers' names, and says nothing.
    """
    modules = [*adapter.updates, *map(vectors.find_vector_module, adapter.vectors)]
    if any(n.startswith(("down_blocks.3.", "up_blocks.3.")) for n in modules):
        return "diffusers"
    usual = [family.spellings.get("kohya") for family in _find_families(adapter) if family.unet]
    return "sgm" if usual[:1] == [KOHYA] else adapter.spelling


def _has_several_text_encoders(adapter: Adapter) -> bool:
    """Recognises the SDXL and FLUX families, whose text encoders kohya numbers."""
    return any(
        find_component(name) in ("text_encoder_2", "text_encoder_3", "transformer")
        or (name.endswith(("attn2.to_k", "attn2.to_v")) and update.down.shape[-1] == 2048)
        for name, update in adapter.updates.items()
    )


def _text_width(adapter: Adapter) -> int | None:
    """Returns the width of the first text encoder."""
    return next(
        (
            update.down.shape[-1]
            for name, update in adapter.updates.items()
            if name.startswith("text_encoder.") and name.endswith((".q_proj", ".k_proj", ".v_proj"))
        ),
        None,
    )
