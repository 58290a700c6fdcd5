"""Paths of updates in a file, and updates that share factors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...architectures import loaders
from ...architectures.depth import ONE_LAYER_UNETS
from ...architectures.families import known_families
from ...architectures.family import SPELLINGS, AuthorsWeight, Family, Spelling
from ...architectures.modules import TEXT_ENCODERS, find_component, is_in_adm, local_name
from ...architectures.recognition import NamedMatrix, recognise_families
from ...core.grouping import group_by
from ...core.lowrank import LowRank
from ...errors import UnsupportedFormat
from .. import fused_updates, vectors
from ..adapter import Adapter
from ..family_guess import SDXL_FAMILY, claimed_family, guess_family
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
class FileSpelling:
    """How a file spells the modules of a transformer."""

    spelling: Spelling
    family: Family | None  # None for an unknown family

    @property
    def authors(self) -> Family | None:
        """The family, if its authors' names are used, with their fused weights."""
        return self.family if self.spelling.names == "authors" else None


def group_modules(adapter: Adapter, format: str) -> list[Group]:
    """Returns the groups in a file of that format."""
    paths = file_paths(adapter, format)
    members = group_by(paths, paths.__getitem__)
    authors = find_authors(adapter, format)
    return [
        Group(
            path,
            {name: adapter.updates[name] for name in modules},
            authors.find_weight_holding(modules[0]) if authors else None,
        )
        for path, modules in members.items()
    ]


def find_authors(adapter: Adapter, format: str) -> Family | None:
    """Returns the family whose fused weights a file has, None without any."""
    spelling = find_spelling(adapter, format)
    return spelling.authors if spelling else None


def find_spelling(adapter: Adapter, format: str) -> FileSpelling | None:
    """Returns how a file spells an adapter's transformer; None without one.

    The spelling that the adapter came in is kept if a program reads it for this family.

    Args:
        adapter: what to write.
        format: "kohya", "diffusers", "peft" or "comfy".

    Raises:
        UnsupportedFormat: no program reads this format for the family, or the family is not told
            and the names of the format depend on it.
    """
    names = _transformer_names(adapter)
    if not names:
        return None
    families = _possible_families(adapter, names)
    if not families:
        return FileSpelling(_spell_described(adapter, format), None)
    style = adapter.style
    if style is not None and format == adapter.format:
        readers = [family for family in families if loaders.is_read(family, style)]
        if readers:
            return FileSpelling(style, readers[0])
    return _spell_family(families, names, format)


def _spell_family(families: tuple[Family, ...], names: list[str], format: str) -> FileSpelling:
    """Returns a format's spelling if all possible families agree on it."""
    spelled = [FileSpelling(f.spellings[format], f) for f in families if format in f.spellings]
    if not spelled:
        formats = " or ".join(f"`format='{known}'`" for known in families[0].spellings)
        raise UnsupportedFormat(
            f"no program reads a LoRA for {families[0].title} in the {format} format; write it "
            f"with {formats}"
        )
    paths = {
        tuple(module_names.spell_module(name, one.spelling, one.family) for name in names)
        for one in spelled
    }
    if len(paths) > 1:
        titles = " or ".join(family.title for family in families)
        raise UnsupportedFormat(
            f"these modules can be of {titles}, which have different names in the {format} format; "
            "write it with `format='diffusers'`"
        )
    return spelled[0]


def _spell_described(adapter: Adapter, format: str) -> Spelling:
    """Returns the spelling of an unknown family: the one of the adapter's file.

    Diffusers' and PEFT's formats have the names of the model itself and need no table. In the other
    two, names are ComfyUI's, which only a file that came in one of them has.
    """
    style = adapter.style
    if style is not None and format == adapter.format:
        return style
    if format in ("diffusers", "peft"):
        return SPELLINGS[format]
    if style is not None and adapter.format not in ("kohya", "comfy"):
        raise UnsupportedFormat(
            f"the model is of no family that prolora knows, nor are its names in the {format} "
            "format; write it with `format='auto'`, in the spelling it came in"
        )
    return SPELLINGS[format]


def _transformer_names(adapter: Adapter) -> list[str]:
    """Lists an adapter's modules of a transformer or ADM network, with vectors.

    Some transformers have a `time_embedding` or `conv_in` too: beside blocks of a transformer,
    these do not belong to a UNet.
    """
    modules = {*adapter.updates, *map(vectors.find_vector_module, adapter.vectors)}
    names = sorted(name for name in modules if find_component(name) not in TEXT_ENCODERS)
    is_ours = any(find_component(name) == "transformer" or is_in_adm(name) for name in names)
    return names if is_ours else []


def _possible_families(adapter: Adapter, names: list[str]) -> tuple[Family, ...]:
    """Returns the families that the modules of a transformer can belong to."""
    family = known_families().get(adapter.family or "")
    if family is not None and not family.unet:
        return (family,)
    matrices = []
    for name in names:
        update = adapter.updates.get(name)
        m, n = update.shape if update is not None else (0, 0)
        matrices.append(NamedMatrix(name, True, (int(m), int(n))))
    families = recognise_families(matrices).families
    claimed = known_families().get(claimed_family(adapter.metadata) or "")
    return (claimed,) if claimed in families else families


def find_families(adapter: Adapter) -> tuple[str, ...]:
    """Returns the ids of the families that an adapter can belong to."""
    names = _transformer_names(adapter)
    if names:
        return tuple(family.id for family in _possible_families(adapter, names))
    guess = _guess_family(adapter)
    return (guess,) if guess else ()


def resolve_format(adapter: Adapter, format: str) -> tuple[Adapter, str]:
    """Returns the adapter in the spelling to write, and its format.

    A named program gets what the adapter came in where it reads all of that, else what it reads
    best, which may be a spelling that none of our formats has by itself. "auto" is what the adapter
    came in; if no program reads that for this family, it is what most programs read.

    Raises:
        UnsupportedFormat: the program reads no format of ours for this family.
    """
    if format in SPELLINGS:
        return respell_adapter(adapter, format), format
    modules = {*adapter.updates, *map(vectors.find_vector_module, adapter.vectors)}
    if format in loaders.known_loaders():
        families = find_families(adapter)
        readers = programs.find_readers(families, adapter.format, adapter.style, modules)
        if loaders.known_loaders()[format].title in readers.whole:
            return adapter, adapter.format
        chosen, style = programs.choose_format(families, format, modules)
    elif format == "auto" and (best := _replace_unread(adapter, modules)):
        chosen, style = best
    else:
        return adapter, format
    adapter = replace(adapter, format=chosen, style=style) if style else adapter
    return adapter if style else respell_adapter(adapter, chosen), chosen


def _replace_unread(adapter: Adapter, modules: set[str]) -> tuple[str, Spelling | None] | None:
    """Returns what most programs read if none reads the adapter's format, else None."""
    families = [known_families()[id_] for id_ in find_families(adapter)]
    if not families or adapter.format == "peft":  # a folder, where the others are files
        return None
    ranked = programs.rank_formats(families, modules)
    style = adapter.style
    came = any(loaders.is_read(one, style) for one in families) if style else False
    if came or adapter.format in {format for format, spelling in ranked if spelling is None}:
        return None
    return ranked[0] if ranked else None


def respell_adapter(adapter: Adapter, format: str) -> Adapter:
    """Returns the adapter in the spelling of a format that was asked for.

    "kohya" means kohya's own names: a FLUX LoRA of OneTrainer, whose kohya format has diffusers'
    names, keeps those for "auto" only. kohya's scripts do not know them. `format` is as asked for:
    "auto" or a format.
    """
    names = _transformer_names(adapter)
    if format not in SPELLINGS or not names or adapter.style is None:
        return adapter
    return replace(adapter, style=None) if _possible_families(adapter, names) else adapter


def file_paths(adapter: Adapter, format: str) -> dict[str, str]:
    """Returns canonical name -> module path; parts of a fused weight share one.

    Raises:
        UnsupportedFormat: the format has no name for a module.
    """
    paths = find_paths(adapter, format, list(adapter.updates))
    if format == "peft":
        _check_one_component(list(adapter.updates))
    return paths


def find_paths(adapter: Adapter, format: str, modules: list[str]) -> dict[str, str]:
    """Returns the paths of an adapter's modules, also of modules with vectors only."""
    spelling = _kohya_spelling(adapter)
    # kohya numbers text encoders where a model has several: in the SDXL family and in FLUX.
    sdxl = spelling == "sgm" or _has_several_text_encoders(adapter)
    family = _guess_family(adapter)
    clip = "clip_h" if _text_width(adapter) == 1024 else "clip_l"
    clip = "qwen3_06b" if family == "cosmos" else clip
    two_layers = family not in ONE_LAYER_UNETS
    transformer = find_spelling(adapter, format)
    paths: dict[str, str] = {}
    path: str | None
    siblings = [*adapter.updates, *modules]
    for name in modules:
        if transformer is not None and find_component(name) not in TEXT_ENCODERS:
            path = module_names.spell_module(name, transformer.spelling, transformer.family)
        elif format == "kohya":
            path = module_names.to_kohya(name, spelling=spelling, siblings=siblings, sdxl=sdxl)
        elif format == "comfy":
            path = module_names.to_comfy(name, siblings=siblings, clip=clip) if two_layers else None
        elif format == "diffusers":
            path = module_names.to_diffusers(name)
        else:
            path = "base_model.model." + local_name(name)
        if path is None:
            raise UnsupportedFormat(
                f"{name} has no name in the {format} format; write it with `format='diffusers'`"
            )
        paths[name] = path
    return paths


def _check_one_component(modules: list[str]) -> None:
    """Refuses several components: a PEFT folder belongs to one model, and does not say to which."""
    places = {find_component(name) for name in modules}
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
    return "sgm" if _guess_family(adapter) in SDXL_FAMILY else adapter.spelling


def _guess_family(adapter: Adapter) -> str | None:
    shapes = {name: (update.shape[0], update.shape[1]) for name, update in adapter.updates.items()}
    return adapter.family or guess_family(shapes, {})


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
