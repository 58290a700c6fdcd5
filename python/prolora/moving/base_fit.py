"""Whether a LoRA is for a base, by names and shapes."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from ..adapters.contents import parse_contents
from ..adapters.family_guess import guess_families, guess_sizes
from ..adapters.lora import Lora
from ..adapters.reading import outline_adapter
from ..adapters.slots import list_matrices, measure_modules
from ..architectures.families import find_title, join_titles
from ..architectures.modules import TEXT_ENCODERS, find_component, is_in_text_encoder
from ..bases import Base, load_layout
from ..bases.experts import ExpertsLike, open_experts
from ..errors import ShapeMismatch, UnsupportedFormat
from ..reports.module_report import ModuleReport, measure_coverage, split_modules
from ..reports.report import Mark
from .base_check import describe_kind, find_newer_base
from .plan import explain_other_shape
from .rows import describe_place, list_unread_modules

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
        if not names:
            words = {"fits": "for this family", "unclear": "perhaps for this family"}
            start = words.get(self.answer, "not for this family")
            return f"{start}: it is for {self.lora_title or 'a model of no known family'}"
        counts = f"{len(placed)} of {len(names)} modules have their place"
        if self.answer == "fits":
            also = f"; they would have it in {self.also}, too" if self.also else ""
            return f"for this base: {counts}{also}"
        if self.moved_to:
            return f"perhaps for this base: {counts}, but it was moved to {self.moved_to}"
        if self.answer == "unclear":
            return (
                f"perhaps for this base: {counts}, but together they look like a LoRA for "
                f"{self.lora_title}; this base is {self.base_title}"
            )
        if self.answer == "other" and self.lora_title not in ("", self.base_title):
            return f"this LoRA is for {self.lora_title}; this base is {self.base_title}"
        row = next((row for row in self.modules if row.status != "mapped"), None)
        first = f"; the first without, {row.source}: {row.reason}" if row else ""
        start = "in part for this base" if self.answer == "in part" else "not for this base"
        return f"{start}: {counts}{first}"

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON; only modules without a counterpart."""
        names, placed = split_modules(self.modules)
        return {
            "base": self.base,
            "answer": self.answer,
            "sentence": self.sentence,
            "lora_title": self.lora_title,
            "base_title": self.base_title,
            "also": self.also,
            "moved_to": self.moved_to,
            "modules": len(names),
            "placed": len(placed),
            "coverage": self.coverage,
            "without_place": {r.source: r.reason for r in self.modules if r.status != "mapped"},
        }


def fit_family(families: Collection[str], family: str) -> BaseFit:
    """Says whether a LoRA for some families is for a named one."""
    answer: Answer = "fits" if family in families else "other" if families else "unclear"
    title = find_title(family)
    return BaseFit(title, answer, join_titles(map(find_title, families)), title, "", ())


def fit_base(opened: Lora, base: ExpertsLike) -> BaseFit:
    """Says whether a LoRA is for a base, from headers alone.

    Raises:
        UnsupportedFormat: one of them cannot be read, or is no base.
    """
    model = open_first(base)
    rows, shapes = _place_modules(opened, model)
    is_unet = any(find_component(name) == "unet" for name in shapes)
    matrices = () if is_unet else list_matrices(opened)
    families = guess_families(shapes, opened.metadata, matrices=matrices)
    sizes = guess_sizes({row.source: (row.shape[0], row.shape[1]) for row in rows})
    foreign = bool(families) and model.family is not None and model.family not in families
    answer: Answer = "in part"
    coverage, moved_to = measure_coverage(rows), ""
    if coverage == 1:
        moved_to = "" if foreign else find_newer_base(opened.metadata, model.name)
        # All blocks of a smaller size, and not of this one.
        other = bool(sizes) and model.layout is not None and model.layout not in sizes
        answer = "unclear" if foreign or moved_to or other else "fits"
    elif foreign or not any(r.target and not is_in_text_encoder(r.source) for r in rows):
        answer = "other"
    ours, theirs = join_titles(map(find_title, families)), describe_kind(model)
    if ours == theirs and model.layout and answer != "fits":  # one family, and another size of it
        ours = join_titles(map(find_title, sizes)) or ours
        theirs = find_title(model.layout)
    others = [size for size in sizes if size != model.layout] if model.layout else []
    others = others or [family for family in families if family != model.family]
    also = join_titles(map(find_title, others)) if answer == "fits" else ""
    return BaseFit(model.name, answer, ours, theirs, also, tuple(rows), moved_to)


def open_first(base: ExpertsLike) -> Base:
    """Opens a base; of one with two experts the first, since both have the same modules."""
    return next(iter(open_experts(base).values()))


def _place_modules(
    opened: Lora, base: Base
) -> tuple[list[ModuleReport], dict[str, tuple[int, int]]]:
    """Returns the rows of a LoRA's modules, and their shapes.

    The shapes are out × in without kernels.
    """
    try:
        adapter = outline_adapter(opened, base.shapes, base.family, headers_only=True)
    except (UnsupportedFormat, ShapeMismatch):
        slots = parse_contents(opened).slots  # it may be unreadable without a base, too
        if not slots:
            raise
        sizes, plain = (measure_modules(slots, with_kernel=x) for x in (True, False))
        rows = []
    else:
        sizes = {name: (x.shape[0], x.shape[1]) for name, x in adapter.updates.items()}
        plain = {
            name: _drop_kernel(size, adapter.kernels.get(name)) for name, size in sizes.items()
        }
        rows = list_unread_modules(adapter)
    for name, size in sizes.items():
        rows.append(describe_place(name, size, _explain_no_place(name, size, base)))
    return rows, plain


def _drop_kernel(size: tuple[int, int], kernel: tuple[int, ...] | None) -> tuple[int, int]:
    return size[0], size[1] // math.prod(kernel or (1,))


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
