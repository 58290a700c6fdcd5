"""The answer of `check`: what a file is, and whether it can be used as asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..adapters.formats.moves import Move, describe_moves
from ..adapters.formats.programs import Readers
from ..architectures.families import find_title, join_titles
from ..architectures.loaders import known_loaders
from ..reports.report import InWords, Mark
from .defects import Defect

if TYPE_CHECKING:  # what a file is can be said without torch
    from ..moving.base_check import BaseFit

Kind = Literal["lora", "base", "unknown"]
_KINDS = {"lora": "LoRA", "base": "base model", "unknown": "neither a LoRA nor a base model"}


@dataclass(frozen=True)
class Part:
    """One part of a pipeline, as a LoRA updates it; of each value the number of updates."""

    updates: int
    algorithms: dict[str, int]
    ranks: dict[int, int]  # those without one (full differences, OFT) are not counted
    alphas: dict[str, int]  # "none" for those without
    scales: dict[str, int]  # the factor in front of up·down

    def __str__(self) -> str:
        """Kinds, ranks and scales in a line."""
        kinds, ranks, scales = (write_counts(x) for x in (self.algorithms, self.ranks, self.scales))
        rank = f", rank {ranks}" if self.ranks else ""
        alpha = f", alpha {write_counts(self.alphas)}" if set(self.alphas) != {"none"} else ""
        return f"{self.updates} × {kinds}{rank}{alpha}, acts at {scales}"


@dataclass(frozen=True, repr=False)
class Check:
    """What a file is and whether it is for the given bases.

    It is true where nothing speaks against using the file as asked.
    """

    path: str
    kind: Kind
    reason: str = ""  # why prolora does not read it
    format: str = ""  # "kohya", "diffusers", "peft" or "comfy"; of a base "single-file" …
    spelling: str = ""  # "diffusers" or "sgm": whose module names
    algorithms: dict[str, int] = field(default_factory=dict)  # kind of update -> how many
    needs_base: bool = False  # the update depends on the base's weights (DoRA, GLoRA, OFT)
    families: tuple[str, ...] = ()  # all that have its modules in its sizes
    sizes: tuple[str, ...] = ()  # ids of the published sizes that it fits
    parts: dict[str, Part] = field(default_factory=dict)  # "unet", "text_encoder", …
    modules: dict[str, int] = field(default_factory=dict)  # part -> modules, fused ones one by one
    vectors: dict[str, int] = field(default_factory=dict)  # trained "bias" and "norm" tensors
    left_out: dict[str, int] = field(default_factory=dict)  # why tensors are not moved -> how many
    readers: Readers = field(default_factory=Readers)
    dtypes: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    size: int = 0  # bytes
    quantised: str = ""  # how a base's weights are stored
    experts: tuple[str, ...] = ()  # folders of a base's two, the one for high noise first
    base_model: str = ""  # as the metadata names it, or known by its hash
    base_hash: str = ""
    family_claimed: str = ""
    version_claimed: str = ""
    trigger_words: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()  # what prolora did to it before, oldest first
    program: str = ""  # title of the program that was asked about
    # What that program leaves out: pattern of modules -> how many; None where this is not known
    skipped: dict[str, int] | None = None
    defects: tuple[Defect, ...] = ()
    fit: BaseFit | None = None  # whether it is for the base that was given
    move: InWords | None = None  # what a transfer between two bases would say

    @property
    def family(self) -> str | None:
        """Its family, where only one fits."""
        return self.families[0] if len(self.families) == 1 else None

    @property
    def mark(self) -> Mark:
        """✔ it can be used as asked, ⚠ perhaps or in part, ✖ it cannot."""
        if self.reason or self.kind == "unknown":
            return "✖"
        marks = [told.mark for told in (self.fit, self.move, *self.defects) if told]
        if self.program and self.kind == "lora" and self.program not in self.readers.whole:
            marks.append("✖" if self.program in self.readers.none else "⚠")
        return max(marks, key="✔⚠✖".index, default="✔")

    def __bool__(self) -> bool:
        """Returns True if nothing speaks against it; a move that works in part is worth a try."""
        return self.mark == "✔" or (self.mark == "⚠" and self.move is not None)

    @property
    def headline(self) -> str:
        """The verdict in a line."""
        if self.reason:
            return f"{_KINDS[self.kind]}: {self.reason.removeprefix(f'{self.path}: ')}"
        if self.move is not None:
            return self.move.headline
        if self.fit is not None:
            return self.fit.sentence
        if self.program and self.kind == "lora":
            return self._tell_program()
        titles = {find_title(size) for size in self.sizes}
        known = titles if len(titles) == 1 else map(find_title, self.families)
        return f"a {_KINDS[self.kind]} for {join_titles(known) or 'a model of no known family'}"

    def _tell_program(self) -> str:
        if self.program in self.readers.whole:
            return f"{self.program} applies all of it"
        if self.program not in self.readers.part + self.readers.none:
            why = "no such model, or no such file was tried" if self.families else "no known family"
            return f"what {self.program} does with it is not known: {why}"
        much = "a part of it" if self.program in self.readers.part else "nothing of it"
        if self.skipped and self.program in self.readers.part:
            every, left = sum(self.modules.values()), sum(self.skipped.values())
            much = f"{every - left} of {every} updates, and skips {left}, as of "
            much += next(iter(self.skipped))
        id_ = next(key for key, one in known_loaders().items() if one.title == self.program)
        return f"{self.program} applies {much}; `convert()` it with `format={id_}`"

    def __repr__(self) -> str:
        """Returns one line: the file and the verdict."""
        return f"Check({self.path!r}: {self.mark} {self.headline})"

    def __str__(self) -> str:
        """Writes the mark and the verdict, then the facts, a line each."""
        facts = [f"{n}{' ' if n in '⚠✖' else ': '}{text}".lstrip() for n, text in self.facts()]
        return "\n".join([f"{self.mark} {self.headline}", *facts])

    def facts(self) -> list[tuple[str, str]]:
        """Returns what is known of the file, as names and texts."""
        said = (*self.move.lines, *self.move.cautions) if self.move else ()
        found = [("", line) for line in said]
        found += [(one.mark, str(one)) for one in self.defects]
        found += [("file", Path(self.path).name), ("kind", self._tell_kind())]
        found += [(part, str(numbers)) for part, numbers in self.parts.items()]
        if len(self.families) > 1:
            titles = join_titles(map(find_title, self.families))
            found.append(("for", f"{titles}: all have these modules; the base decides"))
        claimed = find_title(self.family_claimed) or self.family_claimed
        version = self.version_claimed or claimed
        told = [self.base_model, version, self.base_hash and f"hash {self.base_hash[:16]}"]
        if any(told):
            found.append(("its metadata says", ", ".join(dict.fromkeys(filter(None, told)))))
        if self.experts:
            found.append(("experts", "{} for high noise, {} for low noise".format(*self.experts)))
        if self.moves:
            found.append(("moved before", describe_moves(self.moves)))
        if str(self.readers):
            found.append(("programs", str(self.readers)))
        if self.vectors:
            found.append(("also", f"trained {write_counts(self.vectors)}"))
        found += [("stays behind", f"{number} × {why}") for why, number in self.left_out.items()]
        if self.quantised:
            found.append(("quantised", self.quantised))
        if self.trigger_words:
            found.append(("trained words", ", ".join(self.trigger_words)))
        return found

    def _tell_kind(self) -> str:
        words = [self.format, "authors' names" if self.spelling == "sgm" else ""]
        words += ["needs the base's weights" if self.needs_base else ""]
        size = f"{self.size / 1e6:.3g} MB" if self.size else ""
        words += [f"{self.tensors} tensors", write_counts(self.dtypes), size]
        return ", ".join([_KINDS[self.kind], *filter(None, words)])

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON."""
        told = asdict(self) | {"readers": self.readers._asdict(), "family": self.family}
        told["fit"] = self.fit and self.fit.to_dict()
        return told | {"mark": self.mark, "headline": self.headline, "ok": bool(self)}


def count_values(values: Iterable[str]) -> dict[str, int]:
    """Counts each value, the most frequent first."""
    return dict(Counter(values).most_common())


def write_counts(values: Mapping[Any, int], most: int = 4) -> str:
    """Writes `16 ×600, 8 ×122`, the most frequent first; one value needs no count."""
    if not values:
        return "nothing"
    if len(values) == 1:
        return str(next(iter(values)))
    ordered = sorted(values.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{value} ×{number}" for value, number in ordered[:most])
    return f"{shown}, {len(ordered) - most} more" if len(ordered) > most else shown
