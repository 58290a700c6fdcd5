"""Whether a LoRA belongs to a base: told before a weight is read.

Modules and shapes must fit. What the header says of the base is believed where it is a hash; a name
only warns, since people rename files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from .. import adapters
from ..adapters.adapter import Adapter
from ..adapters.algorithms.truncation import MAX_RANK
from ..adapters.formats.moves import ANY_MODEL, describe_moves, fold_base_name, read_moves
from ..adapters.lora import Lora
from ..adapters.reading import outline_adapter
from ..architectures.families import find_title, join_titles
from ..architectures.modules import is_in_text_encoder
from ..bases import Base
from ..bases.cache.basis_cache import BasisCache
from ..bases.identity import EMPTY_SHORT_HASH, compute_short_hash, have_equal_files, is_identical
from ..errors import AlreadyMoved, ShapeMismatch, UnsupportedFormat, WrongBase
from ..verbs.options import LoraLike, TransferOptions, begin_message
from .base_fit import describe_kind, fit_shapes
from .plan import OTHER_MODEL, check_fits_source

Depth = Literal["updates", "outline"]
"""How far a LoRA is read for its plan: all, or all but what first has to be made with its base."""
NAMED_BASE = "base_model_name_or_path"
"""Where PEFT's configuration names the base."""
HASH_KEYS = ("ss_new_sd_model_hash", "ss_sd_model_hash")
"""Where sd-scripts writes which file the base was."""
_NAME_KEYS = ("ss_sd_model_name", NAMED_BASE)


def read_lora(
    lora: LoraLike,
    base: Base,
    depth: Depth = "updates",
    other: Base | None = None,
    *,
    keep_stored: bool = False,
    rank: int = MAX_RANK,
) -> Adapter:
    """Reads a LoRA; refuses one that does not fit its base by modules and shapes.

    DoRA, OFT and GLoRA need the base's weights, which are not read before. `other` is the base that
    it may belong to instead.
    """
    try:
        adapter = _fit_outline(lora, base, headers_only=depth == "updates")
        if depth == "outline" or isinstance(lora, Adapter):
            return adapter
        names = adapters.BaseNames(base.model, base.shapes)
        return adapters.read_adapter(
            lora, read_weight=base.read_finite, base=names, keep_stored=keep_stored, rank=rank
        )
    except (UnsupportedFormat, ShapeMismatch) as error:
        misfit = error
    title, kind, fits_other, reason = "", "", False, str(misfit)
    try:
        opened = lora if isinstance(lora, Adapter) else Lora.open(lora)
        if isinstance(opened, Lora):
            reason = reason.removeprefix(f"{opened.where}: ")
        fit = fit_shapes(opened, base)
        title, kind = fit.lora_title, fit.base_title
        if other is not None:
            _fit_outline(lora, other, headers_only=True)
            title, fits_other = describe_kind(other), True
    except (UnsupportedFormat, ShapeMismatch):
        pass
    sentences = []
    if title not in ("", kind):
        name = _name_fully(base)
        role = "base" if other is None or other is base else "source"
        sentences = [f"This LoRA is for {title}. The {role} you gave, {name}, is {kind}."]
    if fits_other:
        sentences.append("It fits the target and not the source: did you swap them?")
    where = begin_message(lora)
    if sentences:
        text = f"{where}{' '.join(sentences)} ({reason.removesuffix(OTHER_MODEL)})"
        raise WrongBase(text) from misfit
    if where.removesuffix(": ") in str(misfit) or misfit.command:
        raise misfit
    raise type(misfit)(f"{where}{misfit}")


def _fit_outline(lora: LoraLike, base: Base, headers_only: bool) -> Adapter:
    """Outlines a LoRA, and refuses one that does not fit."""
    if isinstance(lora, Adapter):
        adapter = lora
    else:
        adapter = outline_adapter(lora, base.shapes, base.model, headers_only=headers_only)
    check_fits_source(adapter, [n for n in adapter.updates if not is_in_text_encoder(n)], base)
    return adapter


def check_bases(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: TransferOptions,
    cache: BasisCache | None = None,
    may_be_one: bool = False,
) -> list[str]:
    """Refuses a source that the header contradicts, or the base as target; returns warnings.

    With `options.again` nothing is looked at; `may_be_one` allows source and target to be one.
    """
    if options.again:
        return []
    warnings = [check_moved_before(lora, source, options, cache)]
    header = read_header(lora)
    where = begin_message(lora)
    if not may_be_one and are_one_base(source, target):
        raise WrongBase(
            f"{where}{source.name} and {target.name} are the same model, where the LoRA works as "
            "it is; choose another target, or take `again=True` to move it all the same"
        )
    if is_stated_base(header, target, cache) and not is_stated_base(header, source, cache):
        raise WrongBase(
            f"{where}by the hash in its header this LoRA was trained on the target, "
            f"{_name_fully(target)}, and not on the source, {_name_fully(source)}: did you swap "
            "them? If not, `again=True` moves it all the same"
        )
    if is_named_base(header, target.name) and not is_named_base(header, source.name):
        warnings.append(
            f"Were source and target swapped? The LoRA's header gives the name of the target, "
            f"{target.name}, as the model that it was trained on, and not {source.name}."
        )
    return [doubt for doubt in warnings if doubt]


def warn_of_smaller_size(adapter: Adapter, source: Base) -> list[str]:
    """Doubts a source where the LoRA has all blocks of a smaller size."""
    sizes = adapter.model.sizes
    if not (source.layout and sizes and source.layout not in sizes):
        return []
    smaller, own = join_titles(map(find_title, sizes)), find_title(source.layout)
    return [f"Is this the LoRA's base? It has all blocks of {smaller}; {source.name} is {own}."]


def check_moved_before(
    lora: LoraLike,
    source: Base,
    options: TransferOptions | None = None,
    cache: BasisCache | None = None,
) -> str:
    """Refuses to move a LoRA on from a base that it does not belong to; returns what is doubtful.

    The header of a result names the base that it was moved to, with its hash. A renamed file is the
    same base. A file with the same name and another hash may be the base in another precision: it
    is accepted, and that is said. Without `options` it is not to be moved.
    """
    metadata = read_header(lora)
    moves = read_moves(metadata)
    if not moves or (options and options.again):
        return ""
    last, short_hash = moves[-1], metadata.get("ss_sd_model_hash")
    same = is_identical(source, last.target_hash, short_hash, cache.folder if cache else None)
    named, moved = fold_base_name(source.name), fold_base_name(last.target)
    told_by_name = moved not in (fold_base_name(last.source), *ANY_MODEL)
    if same and named == moved:
        return ""
    unknown = not told_by_name or named in ANY_MODEL or not source.files
    if same or (told_by_name and named == moved) or (same is None and unknown):
        doubt = f"whether {source.name} is that model cannot be told for certain"
        return f"The LoRA was moved to {last.target}; {doubt}."
    role = "source" if options else "base"
    raise AlreadyMoved(
        f"{begin_message(lora)}this LoRA was already moved {describe_moves(moves)}, but the {role} "
        f"is {_name_fully(source)}; give {last.target} as the {role}"
        + (", or take `again=True` to move it all the same" if options else "")
    )


def _name_fully(base: Base) -> str:
    """Returns a base's name, behind its folder's where it only says a role."""
    if base.path is None or base.name not in ("source", "target", "base"):
        return base.name
    return f"{base.path.parent.name}/{base.name}"


def read_header(lora: LoraLike) -> Mapping[str, str]:
    """Reads a LoRA's header and PEFT's base name; a state dict has none."""
    if isinstance(lora, Adapter):
        return lora.metadata
    if isinstance(lora, Mapping):
        return {}
    opened = Lora.open(lora)
    named = (opened.config or {}).get(NAMED_BASE)
    return {NAMED_BASE: named} | opened.metadata if isinstance(named, str) else opened.metadata


def is_stated_base(
    header: Mapping[str, str], base: Base, cache: BasisCache | None = None
) -> bool | None:
    """Returns whether a base is the one whose hash a LoRA's header gives.

    sd-scripts and what came from it write two hashes: `ss_new_sd_model_hash`, the SHA-256 of the
    file, and `ss_sd_model_hash`, eight digits of the hash of 64 KiB, which fine-tunes may share. So
    the first decides where there are both. A word instead of a hash says that there was no one
    file. None where nothing tells.
    """
    full, short = (_read_digits(header, *key) for key in zip(HASH_KEYS, (64, 8), strict=True))
    if full:
        return is_identical(base, f"sha256:{full}", short, cache.folder if cache else None)
    if short in ("", EMPTY_SHORT_HASH) or len(base.files) != 1:
        return None
    return compute_short_hash(base) == short


def is_named_base(header: Mapping[str, str], *names: str) -> bool:
    """Returns whether a LoRA's header names a base by one of its names."""
    stated = {fold_base_name(header[key]) for key in _NAME_KEYS if header.get(key)} - {""}
    return any(fold_base_name(name) in stated for name in names)


def are_one_base(source: Base, target: Base) -> bool:
    """Returns whether two bases are one model: same files, copies, or object."""
    if source is target:
        return True
    if not source.files or not target.files:
        return False
    of_source, of_target = ({file.resolve() for file in base.files} for base in (source, target))
    # One may be a pipeline's folder, and the other that of its model alone.
    if of_source <= of_target or of_target <= of_source:
        return True
    return have_equal_files(source, target)


def _read_digits(header: Mapping[str, str], key: str, count: int) -> str:
    """Returns a hash of so many hexadecimal digits, "" for anything else."""
    text = header.get(key, "").lower()
    return text if re.fullmatch(f"[0-9a-f]{{{count}}}", text) else ""
