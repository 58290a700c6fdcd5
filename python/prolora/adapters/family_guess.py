"""The family of an adapter or checkpoint, by names, shapes and metadata."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import NamedTuple

from ..architectures.families import known_families
from ..architectures.family import SPELLINGS, Family, Spelling
from ..architectures.ldm import ADM, is_adm
from ..architectures.loaders import is_read, is_usual
from ..architectures.modules import find_block, find_component, is_in_adm, is_in_text_encoder
from ..architectures.recognition import NamedMatrix, recognise_families
from .keys.module_names import ModulePath
from .keys.tensor_keys import split_key
from .lora import Lora

_DEPTH = re.compile(r"\.transformer_blocks\.(\d+)\.")
_LANGUAGE_MODEL = re.compile(r"(?:^|\.)layers\.\d+\.(?:self_attn|mlp)\.\w+_proj$")
_CONTEXT = ("attn2.to_k", "attn2.to_v")
_ADM_ATTENTION = re.compile(r"(?:(?:in|out)put_blocks[._]\d+[._]\d+|middle_block[._]\d+)[._]qkv$")
SDXL_FAMILY = ("sdxl", "ssd-1b", "segmind-vega")


class BaseNames(NamedTuple):
    """What is known of the base model that an adapter belongs to."""

    family: str | None = None  # None if it is not known
    modules: Collection[str] = ()  # its canonical module names; empty if they are not known


def guess_family(
    shapes: Mapping[str, tuple[int, int]],
    metadata: Mapping[str, str],
    spelling: Spelling | None = None,
    matrices: Iterable[NamedMatrix] = (),
) -> str | None:
    """Returns the id of a family ("sd15", "sdxl", "flux", …), None if unsure.

    Arguments as for `guess_families`.
    """
    families = guess_families(shapes, metadata, spelling, matrices)
    return families[0] if len(families) == 1 else None


def guess_families(
    shapes: Mapping[str, tuple[int, int]],
    metadata: Mapping[str, str],
    spelling: Spelling | None = None,
    matrices: Iterable[NamedMatrix] = (),
) -> tuple[str, ...]:
    """Returns the ids of all families that an adapter or checkpoint can belong to.

    Names and shapes decide; what the metadata claims decides between families that fit equally
    well, and where names and shapes say nothing. Metadata that contradicts them leaves it open.

    Args:
        shapes: canonical module name -> out × in, 0 where it is not known.
        metadata: header metadata of the file.
        spelling: of a transformer's modules in the file. Among families that fit equally well, only
            those with files in this spelling remain.
        matrices: a transformer's modules under the names of the file, which may be its authors'
            and then tell more than the canonical ones.
    """
    claimed = claimed_family(metadata)
    unet = [name for name in shapes if find_component(name) == "unet"]
    # The `time_embedding` of a UNet is in CogVideoX, too.
    shared = all(name.startswith("time_embedding.") for name in unet)
    if unet and not (shared and any(find_component(name) == "transformer" for name in shapes)):
        widths = (shapes[name][1] for name in unet if name.endswith(_CONTEXT))
        context = next((width for width in widths if width), None)
        guess = _unet_family(unet, context)
        # Only the width of the text embedding tells SD1.x from SD2.x.
        guess = claimed if guess is None or (context is None and claimed == "sd21") else guess
        return (guess,) if guess else ()
    matrices = list(matrices) or [
        NamedMatrix(name, True, shape)
        for name, shape in shapes.items()
        if find_component(name) == "transformer"
    ]
    recognition = recognise_families(matrices)
    ids = tuple(family.id for family in recognition.families)
    if claimed is not None:
        return (claimed,) if not ids or (claimed in ids and recognition.layouts) else ()
    if not recognition.layouts:
        return ()
    if spelling is None:
        return ids
    read = tuple(f.id for f in recognition.families if is_read(f, spelling))
    # A trainer may write what few programs read: that alone makes nothing certain.
    certain = any(is_usual(known_families()[id_], spelling) for id_ in read)
    return read if certain else ids


def choose_names(
    source: Lora, matrices: Iterable[NamedMatrix], base: BaseNames | None
) -> Family | None:
    """Returns the family whose names the modules are read by, or None.

    Where several families have the names, they mostly mean the same modules; where they do not, the
    family of the base and the metadata decide.

    LDM's numbers mean modules of an ADM network where the base is one, and where no base is known
    and attention has its name there.
    """
    if base and base.modules:
        numbered = any(is_in_adm(name) and find_block(name) for name in base.modules)
    else:
        paths = {split_key(key)[0] for key in source.headers}
        numbered = any(map(_ADM_ATTENTION.search, paths)) and is_adm(paths)
    if numbered:
        return ADM
    recognition = recognise_families(matrices)
    able = {family.id: family for family in recognition.able}
    for id_ in (base and base.family, claimed_family(source.metadata)):
        if id_ in able:
            return able[id_]
    return recognition.families[0] if recognition.families else None


def claimed_family(metadata: Mapping[str, str]) -> str | None:
    """Returns the family that the metadata claims by version or architecture."""
    return _find_claim(metadata)[0]


def claimed_version(metadata: Mapping[str, str]) -> str | None:
    """Returns the metadata's name of the model: "FLUX.1 Kontext", "Wan 2.2"."""
    return _find_claim(metadata)[1]


def _find_claim(metadata: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Returns family and name of the model that the metadata claims."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        value = metadata.get(key, "").lower()
        for start, *claim in _claims():
            if value.startswith(start):
                return claim[0], claim[1]
    return None, None


@cache
def _claims() -> list[tuple[str, str, str]]:
    """Lists how versions and architectures begin in metadata, with family and model.

    The longest beginning comes first: "flux2" is not "flux".
    """
    families = known_families().values()
    listed = [(start, one.id, name) for one in families for start, name in one.claims.items()]
    return sorted(listed, key=lambda claim: -len(claim[0]))


def guess_sizes(shapes: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Returns the ids of the published sizes that fit all modules beside text encoders.

    Where a size has all of its blocks among them, only such sizes count. `shapes` is canonical
    module name -> out × in, 0 where it is not known.
    """
    model = {name: shape for name, shape in shapes.items() if not is_in_text_encoder(name)}
    unets = not any(find_component(name) == "transformer" for name in model)
    return recognise_families((NamedMatrix(n, True, s) for n, s in model.items()), unets).layouts


def _unet_family(unet: list[str], context: int | None) -> str | None:
    depths = [int(depth) for name in unet for depth in _DEPTH.findall(name)]
    four_blocks = any(name.startswith(("up_blocks.3.", "down_blocks.3.")) for name in unet)
    if context == 2048 or (context is None and max(depths, default=0) > 0):
        return _sdxl_family(unet)
    if context == 1024:
        return "sd21"
    if context == 768 or (context is None and four_blocks and depths):
        return "bk-sdm" if _is_pruned_sd1(unet) else "sd15"
    return None


def _sdxl_family(unet: list[str]) -> str:
    """Tells SDXL and its pruned students apart by the depth of the lowest block."""
    if _is_koala(unet):
        return "koala"
    lowest = [name for name in unet if name.startswith("down_blocks.2.attentions.")]
    depth = max((int(d) for name in lowest for d in _DEPTH.findall(name)), default=None)
    if depth is None or any(name.startswith("mid_block.attentions.") for name in unet):
        return "sdxl"
    return "sdxl" if depth > 3 else "ssd-1b" if depth > 1 else "segmind-vega"


def _is_koala(unet: list[str]) -> bool:
    """Recognises KOALA: one attention in a down block, two in an up block.

    SDXL has two and three.
    """
    places = [name.split(".")[:4] for name in unet if ".attentions." in name]
    down = {(block, layer) for side, block, _, layer in places if side == "down_blocks"}
    up = {layer for side, _, _, layer in places if side == "up_blocks"}
    return down == {("1", "0"), ("2", "0")} and up == {"0", "1"}


def _is_pruned_sd1(unet: list[str]) -> bool:
    """Recognises the BK-SDM students: one layer in every down block, SD1.5 has two."""
    down = [name for name in unet if name.startswith("down_blocks.")]
    attentions = {name.split(".")[3] for name in down if ".attentions." in name}
    return attentions == {"0"} and not any(n.startswith("mid_block.attentions.") for n in unet)


def is_language_model(modules: Iterable[str]) -> bool:
    """Recognises a language model by modules of no known family."""
    return any(_LANGUAGE_MODEL.search(n) and not is_in_text_encoder(n) for n in modules)


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
