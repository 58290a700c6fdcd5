"""Whether a LoRA belongs to a base: told before a weight is read.

Modules and shapes must fit. What the header says of the base is believed where it is a hash; a name
only warns, since people rename files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .. import adapters
from ..adapters.adapter import Adapter
from ..adapters.algorithms.truncation import MAX_RANK
from ..adapters.contents import parse_contents
from ..adapters.formats.moves import Move, describe_moves, read_moves
from ..adapters.lora import Lora
from ..adapters.reading import outline_adapter
from ..adapters.slots import measure_modules
from ..architectures.families import find_title, join_titles, known_families
from ..architectures.identify import Model, is_language_model
from ..architectures.layouts import known_layouts, load_layout
from ..architectures.modules import TEXT_ENCODERS, find_component, is_in_text_encoder
from ..bases import Base, open_base
from ..bases.cache.basis_cache import BasisCache
from ..bases.describe import describe_base
from ..bases.experts import ExpertsLike, open_experts
from ..bases.identity import EMPTY_SHORT_HASH, compute_short_hash, have_equal_files, is_identical
from ..errors import AlreadyMoved, MissingFile, ShapeMismatch, UnsupportedFormat, WrongBase, suggest
from ..reports.module_report import ModuleReport, measure_coverage, split_modules
from ..reports.report import Mark
from .ledger import list_unread_modules
from .options import LoraLike, TransferOptions, begin_message
from .plan import OTHER_MODEL, check_fits_source, explain_other_shape
from .rows import describe_place

# Words of file names for the form in which a model is stored, not for the model.
_FORMS = re.compile(
    r"safetensors|gguf|diffusers|b?fp?(?:8|16|32)|float(?:8|16|32)|half|int8|scaled|e4m3(?:fn)?|e5m2"
    r"|pruned|emaonly|ema|noema"
)
_QUANTISED = re.compile(r"(?<![a-z0-9])i?q\d(?:_[a-z0-9]+)*")  # GGUF's Q4_K_M and the like
Depth = Literal["updates", "outline"]
"""How far a LoRA is read for its plan: all, or all but what first has to be made with its base."""
NAMED_BASE = "base_model_name_or_path"
"""Where PEFT's configuration names the base."""
# Names of folders and objects that any model may have.
_ANY_MODEL = {"unet", "transformer", "transformer 2", "model", "diffusion pytorch model", ""}
_ANY_MODEL |= {"the source", "the target"}  # in memory
HASH_KEYS = ("ss_new_sd_model_hash", "ss_sd_model_hash")
"""Where sd-scripts writes which file the base was."""
_NAME_KEYS = ("ss_sd_model_name", NAMED_BASE)


# Published names of sizes that models share.
_OTHER_NAMES = {
    "wan2.1-t2v-1.3b": "wan-t2v-1.3b",
    "wan2.1-t2v-14b": "wan-t2v-14b",
    "wan2.2-t2v-a14b": "wan-t2v-14b",
    "wan2.2-i2v-a14b": "wan2.2-i2v-14b",
}
Answer = Literal["fits", "unclear", "in part", "other"]
MARKS: dict[Answer, Mark] = {"fits": "✔", "unclear": "⚠", "in part": "⚠", "other": "✖"}


@dataclass(frozen=True)
class BaseFit:
    """Whether a LoRA is for a base, by names and shapes."""

    base: str  # the base's name
    # "fits": every module has a counterpart, and the base is of a family that the LoRA can be of,
    # or of none that is known. "unclear": every module has a counterpart, but as a whole they are
    # another family's, or prolora moved the LoRA from this base to another. "in part": some have.
    # "other": the LoRA is another model's.
    answer: Answer
    lora_title: str  # what the LoRA is for, in words; "" where nothing tells
    base_title: str  # what the base is, in words
    also: str  # other models that have all these modules in these sizes, in words; "" for none
    # A row for every module of the LoRA: "mapped" with a counterpart, else the reason
    modules: tuple[ModuleReport, ...]
    # The base that prolora moved it to from this one, by their names; "" for none
    moved_to: str = ""
    published: str = ""  # the published model that it was compared with, in place of a base

    @property
    def coverage(self) -> float:
        """The share of the LoRA's modules that have a place, 0 … 1."""
        return measure_coverage(self.modules)

    @property
    def mark(self) -> Mark:
        """✔ it is for this base, ⚠ in part or perhaps, ✖ it is not."""
        return MARKS[self.answer]

    @property
    def sentence(self) -> str:
        """The answer in a line."""
        names, placed = split_modules(self.modules)
        base = self.published or "this base"
        is_ = "not for " if self.published else "this base is "
        counts = f"{len(placed)} of {len(names)} modules have their place"
        if self.answer == "fits":
            also = f"; they would have it in {self.also}, too" if self.also else ""
            return f"for {base}: {counts}{also}"
        if self.moved_to:
            return f"perhaps for {base}: {counts}, but it was moved to {self.moved_to}"
        if self.answer == "unclear":
            return (
                f"perhaps for {base}: {counts}, but together they look like a LoRA for "
                f"{self.lora_title}; {is_}{self.base_title}"
            )
        if self.answer == "other" and self.lora_title not in ("", self.base_title):
            return f"this LoRA is for {self.lora_title}; {is_}{self.base_title}"
        row = next((row for row in self.modules if row.status != "mapped"), None)
        first = f"; the first without, {row.source}: {row.reason}" if row else ""
        start = f"{'in part' if self.answer == 'in part' else 'not'} for {base}"
        return f"{start}: {counts}{first}"

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON; only modules without a counterpart."""
        names, placed = split_modules(self.modules)
        return vars(self) | {
            "sentence": self.sentence,
            "modules": len(names),
            "placed": len(placed),
            "coverage": self.coverage,
            "without_place": {r.source: r.reason for r in self.modules if r.status != "mapped"},
        }


def find_published(base: object) -> str | None:
    """Returns the id of a family or published size that a base's name means; None for a path."""
    if not isinstance(base, str) or os.path.exists(base):
        return None
    name = _OTHER_NAMES.get(base.lower(), base.lower())
    return name if name in known_families() or name in known_layouts() else None


def fit_published(lora: LoraLike, id_: str) -> BaseFit:
    """Says whether a LoRA is for a family, or for one of its published sizes."""
    family = known_families().get(id_)
    sizes = family.layouts if family else (id_,)
    likely = [size for size in find_model(lora).sizes if size in sizes] or sizes
    found = [_fit_opened(lora, _outline_published(size)) for size in likely]
    best = max(found, key=lambda fit: ("✖⚠✔".index(fit.mark), fit.coverage))
    return replace(best, published=best.base)


def _outline_published(size: str) -> Base:
    """Returns a base without values that has the names and shapes of a published size."""
    zero = torch.zeros(())
    shapes = load_layout(size).shapes
    return replace(
        open_base({name: zero.expand(shape) for name, shape in shapes.items()}),
        name=find_title(size),
    )


def fit_base(lora: LoraLike, base: ExpertsLike) -> BaseFit:
    """Says whether a LoRA is for a base, from headers alone; of two experts the first.

    Raises:
        UnsupportedFormat: one of them cannot be read, or is no base.
    """
    try:
        return _fit_opened(lora, next(iter(open_experts(base).values())))
    except MissingFile as error:
        known = (*known_families(), *known_layouts(), *_OTHER_NAMES)
        meant = suggest(base.lower(), known) if isinstance(base, str) else ""
        raise type(error)(f"{error}{meant}") from error


def _fit_opened(lora: LoraLike, model: Base) -> BaseFit:
    """Says whether a LoRA is for an opened base."""
    rows, header = _place_modules(lora, model), read_header(lora)
    own = find_model(lora)
    families, sizes = own.families, own.sizes
    foreign = bool(families) and model.family is not None and model.family not in families
    answer: Answer = "in part"
    coverage, moved_to = measure_coverage(rows), ""
    if coverage == 1:
        last = (read_moves(header) or (Move(),))[-1]
        old, new = fold_base_name(model.name), fold_base_name(last.target)
        if last.source == model.name and not (foreign or new == old or old in _ANY_MODEL):
            moved_to = last.target
        # All blocks of a smaller size, and not of this one.
        other = bool(sizes) and model.layout is not None and model.layout not in sizes
        answer = "unclear" if foreign or moved_to or other else "fits"
    elif foreign or not any(r.target and not is_in_text_encoder(r.source) for r in rows):
        answer = "other"
    title, kind = join_titles(map(find_title, families)), describe_kind(model)
    if title == kind and model.layout and answer != "fits":  # one family, and another size of it
        title = join_titles(map(find_title, sizes)) or title
        kind = find_title(model.layout)
    is_words = is_language_model(row.source for row in rows)
    title = title or ("a language model" if is_words and not families else "")
    others = [size for size in sizes if size != model.layout] if model.layout else []
    others = others or [family for family in families if family != model.family]
    also = join_titles(map(find_title, others)) if answer == "fits" else ""
    return BaseFit(model.name, answer, title, kind, also, tuple(rows), moved_to)


def _place_modules(lora: LoraLike, base: Base) -> list[ModuleReport]:
    """Returns the rows of a LoRA's modules."""
    try:
        adapter = _outline(lora, base)
    except (UnsupportedFormat, ShapeMismatch):
        if isinstance(lora, Adapter):
            raise
        # It may be unreadable without a base, too
        slots = parse_contents(Lora.open(lora)).slots
        if not slots:
            raise
        rows, sizes = [], measure_modules(slots)
    else:
        rows = list_unread_modules(adapter)
        sizes = {name: (x.shape[0], x.shape[1]) for name, x in adapter.updates.items()}
    for name, size in sizes.items():
        rows.append(describe_place(name, size, _explain_no_place(name, size, base)))
    return rows


def _outline(lora: LoraLike, base: Base, headers_only: bool = True) -> Adapter:
    """Outlines a LoRA without the base's weights, or from its header alone."""
    if isinstance(lora, Adapter):
        return lora
    return outline_adapter(lora, base.shapes, base.model, headers_only=headers_only)


def _explain_no_place(name: str, size: tuple[int, int], base: Base) -> str | None:
    """Explains why a module has no counterpart on a base; None if it has."""
    encoder = find_component(name)
    if encoder in TEXT_ENCODERS and not any(m.startswith(f"{encoder}.") for m in base.shapes):
        # Many files of a model come without its text encoders.
        known = load_layout(base.layout).text_encoders if base.layout else TEXT_ENCODERS
        number = TEXT_ENCODERS.index(encoder) + 1
        return None if number <= len(known) else f"the base has fewer than {number} text encoders"
    if name not in base.shapes:
        return "the base has no such module"
    return explain_other_shape(name, size, base) if 0 not in size else None


def describe_kind(base: Base) -> str:
    """Returns the title of a base's family, or what it looks like."""
    return find_title(base.family) if base.family else describe_base(base)


def find_model(lora: LoraLike) -> Model:
    """Returns what a LoRA is for, by its header alone where it is a file."""
    return lora.model if isinstance(lora, Adapter) else Lora.open(lora).model


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
            lora, read_weight=base.read, base=names, keep_stored=keep_stored, rank=rank
        )
    except (UnsupportedFormat, ShapeMismatch) as error:
        misfit = error
    title, kind, fits_other = "", "", False
    try:
        fit = fit_base(lora, base)
        title, kind = fit.lora_title, fit.base_title
        if other is not None:
            _fit_outline(lora, other, headers_only=True)
            title, fits_other = describe_kind(other), True
    except (UnsupportedFormat, ShapeMismatch):
        pass
    sentences = []
    if title not in ("", kind):
        sentences = [f"This LoRA is for {title}. The source you gave, {base.name}, is {kind}."]
    if fits_other:
        sentences.append("It fits the target and not the source: did you swap them?")
    where = begin_message(lora)
    told = str(misfit).removeprefix(where)
    if sentences:
        refusal = WrongBase if fits_other else type(misfit)
        text = f"{where}{' '.join(sentences)} ({told.removesuffix(OTHER_MODEL)})"
        raise refusal(text) from misfit
    if where.removesuffix(": ") in told or told != str(misfit) or misfit.command:
        raise misfit
    raise type(misfit)(f"{where}{told}")


def _fit_outline(lora: LoraLike, base: Base, headers_only: bool) -> Adapter:
    """Outlines a LoRA, and refuses one that does not fit."""
    adapter = _outline(lora, base, headers_only)
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
    """Refuses a source that the header contradicts, or the base as target; returns doubts.

    With `options.again` nothing is looked at; `may_be_one` allows source and target to be one.
    """
    if options.again:
        return []
    doubts = [check_moved_before(lora, source, options, cache)]
    header = read_header(lora)
    where = begin_message(lora)
    if not may_be_one and are_one_base(source, target):
        raise WrongBase(
            f"{where}{source.name} and {target.name} are the same model, where the LoRA works as "
            "it is; choose another target, or take `again=True` to move it all the same"
        )
    if is_stated_base(header, target, cache) and not is_stated_base(header, source, cache):
        raise WrongBase(
            f"{where}by the hash in its header this LoRA was trained on the target, {target.name}, "
            f"and not on the source, {source.name}: did you swap them? If not, `again=True` moves "
            "it all the same"
        )
    if is_named_base(header, target.name) and not is_named_base(header, source.name):
        doubts.append(
            f"Were source and target swapped? The LoRA's header gives the name of the target, "
            f"{target.name}, as the model that it was trained on, and not {source.name}."
        )
    return [doubt for doubt in doubts if doubt]


def doubt_size(adapter: Adapter, source: Base) -> list[str]:
    """Doubts a source where the LoRA has all blocks of a smaller size."""
    found = adapter.model.sizes
    if not (source.layout and found and source.layout not in found):
        return []
    smaller, own = join_titles(map(find_title, found)), find_title(source.layout)
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
    told_by_name = moved not in (fold_base_name(last.source), *_ANY_MODEL)
    if same and named == moved:
        return ""
    unknown = not told_by_name or named in _ANY_MODEL or not source.files
    if same or (told_by_name and named == moved) or (same is None and unknown):
        doubt = f"whether {source.name} is that model cannot be told for certain"
        return f"The LoRA was moved to {last.target}; {doubt}."
    role = "source" if options else "base"
    raise AlreadyMoved(
        f"{begin_message(lora)}this LoRA was already moved {describe_moves(moves)}, but the {role} "
        f"is {source.name}; give {last.target} as the {role}"
        + (", or take `again=True` to move it all the same" if options else "")
    )


def read_header(lora: LoraLike) -> Mapping[str, str]:
    """Reads a LoRA's header and PEFT's base name; a state dict has none."""
    if isinstance(lora, Adapter):
        return lora.metadata
    if isinstance(lora, Mapping):
        return {}
    opened = Lora.open(lora)
    named = (opened.config or {}).get(NAMED_BASE)
    return {NAMED_BASE: named} | opened.metadata if isinstance(named, str) else opened.metadata


def fold_base_name(name: str) -> str:
    """Folds a base's name: no folders, case or words for its storage."""
    plain = _QUANTISED.sub("", re.split(r"[/\\]", name)[-1].lower())
    words = re.split(r"[\s._-]+", plain)
    return " ".join(word for word in words if word and not _FORMS.fullmatch(word))


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
    ours, theirs = ({file.resolve() for file in base.files} for base in (source, target))
    if ours <= theirs or theirs <= ours:  # a pipeline's folder, and that of its model alone
        return True
    return have_equal_files(source, target)


def _read_digits(header: Mapping[str, str], key: str, count: int) -> str:
    """Returns a hash of so many hexadecimal digits, "" for anything else."""
    text = header.get(key, "").lower()
    return text if re.fullmatch(f"[0-9a-f]{{{count}}}", text) else ""
