"""Whether a LoRA is for a base, by names and shapes; needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from ..adapters.algorithms import forms
from ..adapters.contents import parse_contents
from ..adapters.file_model import BaseNames
from ..adapters.formats.moves import ANY_MODEL, Move, fold_base_name, read_moves
from ..adapters.key_groups import Slot, measure_modules
from ..adapters.lora import Lora
from ..architectures.aliases import NamedBase, find_named, list_base_names
from ..architectures.families import find_title, join_titles
from ..architectures.identify import identify_base, is_language_model
from ..architectures.layouts import load_layout
from ..architectures.modules import TEXT_ENCODERS, find_component, is_in_text_encoder
from ..bases.describe import BaseShapes, NamedShapes, describe_base, explain_other_shape
from ..errors import ShapeMismatch, UnsupportedFormat, suggest
from ..reports.module_report import (
    ModuleReport,
    list_unread_modules,
    measure_coverage,
    split_modules,
)
from ..reports.report import Mark

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter

Answer = Literal["fits", "unclear", "in part", "other"]
MARKS: dict[Answer, Mark] = {"fits": "✔", "unclear": "⚠", "in part": "⚠", "other": "✖"}


@dataclass(frozen=True)
class BaseMatch:
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
        counts = f"{len(placed)} of {len(names)} modules have their place"
        if self.answer == "fits":
            also = f"; they would have it in {self.also}, too" if self.also else ""
            looked_at = "" if self.published else ", by names and shapes"
            return f"for {base}{looked_at}: {counts}{also}"
        if self.moved_to:
            return f"perhaps for {base}: {counts}, but it was moved to {self.moved_to}"
        if self.answer == "unclear":
            is_base = "" if self.published else f"; this base is {self.base_title}"
            return (
                f"perhaps for {base}: {counts}, but together they look like a LoRA for "
                f"{self.lora_title}{is_base}"
            )
        if self.answer == "other" and self.lora_title not in ("", self.base_title):
            not_ = "not for" if self.published else "this base is"
            return f"this LoRA is for {self.lora_title}; {not_} {self.base_title}"
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


def suggest_published(base: object) -> str:
    """Asks whether the name most alike, of a published model, is meant."""
    return suggest(base.lower(), list_base_names()) if isinstance(base, str) else ""


def find_published(base: object) -> NamedBase | None:
    """Returns the published model that a base's name means; None for a path."""
    return find_named(base) if isinstance(base, str) and not os.path.exists(base) else None


def fit_published(lora: Lora, named: NamedBase) -> BaseMatch:
    """Reports whether a LoRA is for a published model, or for one of its sizes."""
    likely = [size for size in lora.model.sizes if size in named.sizes] or named.sizes
    matches = [fit_shapes(lora, _outline_published(size)) for size in likely]
    best = max(matches, key=lambda fit: ("✖⚠✔".index(fit.mark), fit.coverage))
    name = f"{named.title} ({named.note})" if named.note else best.base
    return replace(best, published=name)


@cache
def _outline_published(size: str) -> BaseShapes:
    shapes = load_layout(size).shapes
    return BaseShapes(find_title(size), shapes, {n: n for n in shapes}, identify_base(shapes))


def fit_shapes(lora: Lora | Adapter, model: NamedShapes) -> BaseMatch:
    """Reports whether a LoRA is for an opened base, from its header alone."""
    rows, own = _place_modules(lora, model), lora.model
    families, sizes = own.families, own.sizes
    foreign = bool(families) and model.family is not None and model.family not in families
    answer: Answer = "in part"
    coverage, moved_to = measure_coverage(rows), ""
    if coverage == 1:
        last = (read_moves(lora.metadata) or (Move(),))[-1]
        old, new = fold_base_name(model.name), fold_base_name(last.target)
        if last.source == model.name and not (foreign or new == old or old in ANY_MODEL):
            moved_to = last.target
        # All blocks of a smaller size, and not of this one.
        other = bool(sizes) and model.layout is not None and model.layout not in sizes
        answer = "unclear" if foreign or moved_to or other else "fits"
    elif foreign or not any(r.target and not is_in_text_encoder(r.source) for r in rows):
        answer = "other"
    title, kind = join_titles(map(find_title, families)), describe_kind(model)
    if model.family in families:  # of several the base decides
        title = kind
        if model.layout and model.layout not in sizes and answer != "fits":  # another size of it
            title = join_titles(map(find_title, sizes)) or title
            kind = find_title(model.layout)
    is_words = is_language_model(row.source for row in rows)
    title = title or ("a language model" if is_words and not own.names else "")
    others = [size for size in sizes if size != model.layout] if model.layout else []
    others = others or [family for family in families if family != model.family]
    also = join_titles(map(find_title, others)) if answer == "fits" else ""
    return BaseMatch(model.name, answer, title, kind, also, tuple(rows), moved_to)


def _place_modules(lora: Lora | Adapter, base: NamedShapes) -> list[ModuleReport]:
    if not isinstance(lora, Lora):
        rows = list_unread_modules(lora)
        sizes = {name: (x.shape[0], x.shape[1]) for name, x in lora.updates.items()}
    else:
        try:
            contents = parse_contents(lora, BaseNames(base.model, base.shapes))
        except (UnsupportedFormat, ShapeMismatch):
            contents = parse_contents(lora)  # it may be unreadable with its base alone
            if not contents.slots:
                raise
        rows = list_unread_modules(contents)
        sizes = measure_modules(contents.slots)
        for slot in contents.slots:
            if _lacks_encoder(slot, base):
                reason = forms.explain_no_encoder(slot.keys.keys())
                for name in slot.module.modules:
                    rows.append(_describe_place(name, sizes.pop(name), reason))
    for name, size in sizes.items():
        rows.append(_describe_place(name, size, _explain_no_place(name, size, base)))
    return rows


def _lacks_encoder(slot: Slot, base: NamedShapes) -> bool:
    """Returns whether an update depends on a text encoder that the base does not hold."""
    missing = [name for name in slot.module.modules if name not in base.shapes]
    return forms.needs_base(slot.keys.keys()) and any(map(is_in_text_encoder, missing))


def _describe_place(name: str, shape: tuple[int, int], reason: str | None) -> ModuleReport:
    """Makes the row of a module on a base; `reason` says why it has no place there."""
    status, target = ("skipped", None) if reason else ("mapped", name)
    return ModuleReport(name, target, status, reason or "has its place", shape, 1)


def _explain_no_place(name: str, size: tuple[int, int], base: NamedShapes) -> str | None:
    """Explains why a module has no counterpart on a base; None if it has."""
    encoder = find_component(name)
    if encoder in TEXT_ENCODERS and not any(m.startswith(f"{encoder}.") for m in base.shapes):
        # Many files of a model come without its text encoders.
        encoders = load_layout(base.layout).text_encoders if base.layout else TEXT_ENCODERS
        number = TEXT_ENCODERS.index(encoder) + 1
        return (
            None if number <= len(encoders) else f"the base has fewer than {number} text encoders"
        )
    if name not in base.shapes:
        return "the base has no such module"
    return explain_other_shape(name, size, base) if 0 not in size else None


def describe_kind(base: NamedShapes) -> str:
    """Returns the title of a base's family, or what it looks like."""
    return find_title(base.family) if base.family else describe_base(base)
