"""The answer of `check`: what a file is, and whether it can be used as asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..adapters.formats.moves import UNSTATED, Move, StatedBase, describe_moves, explain_other_bases
from ..adapters.formats.programs import Readers
from ..architectures.aliases import join_sizes
from ..architectures.families import find_title, join_titles
from ..architectures.loaders import known_loaders
from ..core.controls import replace_controls
from ..files.sizes import format_size
from ..reports.report import Mark, Sentence
from .defects import Defect

if TYPE_CHECKING:  # what a file is can be said without torch
    from ..moving.base_fit import BaseMatch

Kind = Literal["lora", "base", "unknown"]
_KINDS = {"lora": "LoRA", "base": "base model", "unknown": "neither a LoRA nor a base model"}
_NO_FAMILY = "a model of no known family"


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
        return f"{self.updates} × {kinds}{rank}{alpha}, scale {scales} (alpha / rank)"


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
    named: tuple[str, ...] = ()  # all that fit best by its names, whatever its sizes
    foreign: tuple[str, ...] = ()  # modules that these families do not have
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
    stated: StatedBase = UNSTATED  # the base that its header names
    trigger_words: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()  # what prolora did to it before, oldest first
    program: str = ""  # title of the program that was asked about
    # What that program leaves out: pattern of modules -> how many; None where this is not known
    skipped: dict[str, int] | None = None
    convertible: bool = False  # whether it reads all of what `convert` makes for it
    defects: tuple[Defect, ...] = ()
    base_match: BaseMatch | None = None  # whether it is for the base that was given
    move: Sentence | None = None  # what a transfer between two bases would say

    @property
    def family(self) -> str | None:
        """Its family, where only one fits."""
        return self.families[0] if len(self.families) == 1 else None

    @property
    def mark(self) -> Mark:
        """✔ it can be used as asked, ⚠ perhaps or in part, ✖ it cannot."""
        return max((mark for mark, _ in self.verdicts()), key="✔⚠✖".index)

    def __bool__(self) -> bool:
        """Returns True if nothing speaks against it; a move that works in part is worth a try."""
        return self.mark == "✔" or (self.mark == "⚠" and self.move is not None)

    @property
    def headline(self) -> str:
        """The sentence that gave the mark."""
        return next(sentence for mark, sentence in self.verdicts() if mark == self.mark)

    def verdicts(self) -> list[tuple[Mark, str]]:
        """Lists all that speaks for or against it; answers to what was asked come first."""
        if self.reason or self.kind == "unknown":
            return [("✖", self.reason.removeprefix(f"{self.path}: ") or _KINDS[self.kind])]
        verdicts = [(self.move.mark, self.move.headline)] if self.move else []
        verdicts += [(self.base_match.mark, self.base_match.sentence)] if self.base_match else []
        if self.kind == "lora":
            verdicts += [self._judge_program()] if self.program else []
            # A base that was compared decides, and another question than programs was asked.
            compared = self.move is not None or bool(self.base_match and self.base_match.modules)
            verdicts += [] if compared else [self._judge_place()]
            is_identified = bool(self.families) and not (compared or self.program)
            verdicts += [self._judge_readers()] if is_identified else []
        else:
            title = f"for {self._title}" if self._title else "of no known family"
            verdicts.append(("✔", f"a {_KINDS[self.kind]} {title}"))
        return verdicts + [(one.mark, one.text) for one in self.defects]

    @property
    def _title(self) -> str:
        """What it is for: a published size, or families."""
        return join_sizes(self.sizes, self.families)

    def _judge_place(self) -> tuple[Mark, str]:
        if not self.families:
            others = " and others" * (len(self.named) > 1)
            sizes = (
                f", though its names fit {find_title(self.named[0])}{others}" if self.named else ""
            )
            return "⚠", f"a LoRA for {_NO_FAMILY}{sizes}: its base decides"
        if self.foreign:
            count, every = len(self.foreign), sum(self.modules.values())
            are = "module is" if count == every == 1 else f"of {every} modules are"
            return "⚠", f"{count} {are} not in {self._title}, the first {self.foreign[0]}"
        return "✔", f"a LoRA for {self._title}"

    def _judge_program(self) -> tuple[Mark, str]:
        """Judges whether the program that was asked about reads all of it."""
        title, readers = self.program, self.readers
        sure = [reader for reader in readers.whole if reader not in readers.untried]
        if title in sure:
            return "✔", f"{title} applies all of it"
        id_ = next(key for key, one in known_loaders().items() if one.title == title)
        several = len(self.families) > 1
        fix = f"; `convert()` it with `format={id_}`" if self.convertible or several else ""
        fix += " and its base model" * (several and not self.convertible)
        if title in readers.none:
            return "✖", f"{title} reads nothing of it{fix}"
        if able := next((x for x in sure if x.startswith(f"{title} (as ")), ""):
            return "⚠", f"{able} applies all of it; as another model's, it may not"
        if title not in readers.whole + readers.part:
            why = "with such a file" if self.families else "with a model of no known family"
            return "⚠", f"{title} was not tried {why}: what it does with it is not known{fix}"
        much = "its denoiser's updates; with its text encoders it was not tried"
        if title in readers.part:
            much = "a part of it"
            if self.skipped:
                every, left = sum(self.modules.values()), sum(self.skipped.values())
                first = next(iter(self.skipped))
                much = f"{every - left} of {every} updates, and skips {left}, as of {first}"
        return "⚠", f"{title} applies {much}{fix}"

    def _judge_readers(self) -> tuple[Mark, str]:
        # PEFT itself reads its folders, whatever the model.
        if self.format == "peft" or {*self.readers.whole} - {*self.readers.untried}:
            return "✔", f"read by {', '.join(self.readers.whole) or 'PEFT'}"
        if some := self.readers.whole + self.readers.part:
            return "⚠", f"no program is known to read all of it; in part: {', '.join(some)}"
        if self.readers.none:
            return "⚠", f"no program is known to read it; tried: {', '.join(self.readers.none)}"
        return "⚠", "no program was tried with such a file"

    def __repr__(self) -> str:
        """Returns one line: the file and the verdict."""
        return f"Check({self.path!r}: {self.mark} {self.headline})"

    def __str__(self) -> str:
        """Writes the mark and the verdict, then the facts, a line each."""
        facts = [f"{n}{' ' if n in '⚠✖' else ': '}{text}".lstrip() for n, text in self.facts()]
        return replace_controls("\n".join([f"{self.mark} {self.headline}", *facts]))

    def facts(self) -> list[tuple[str, str]]:
        """Returns what is known of the file, as names and texts."""
        sentences = (*self.move.lines, *self.move.cautions) if self.move else ()
        rows = [("", line) for line in sentences]
        if self.move and "=" in " ".join([self.move.headline, *sentences]):
            rows.append(("", "The options named here are those of `transfer()`."))
        first = {self.headline, *(one.text for one in self.defects)}
        rows += [one for one in self.verdicts() if one[0] != "✔" and one[1] not in first]
        for one in self.defects:
            if one.text != self.headline:
                rows.append((one.mark, str(one)))
            elif one.fix:
                rows.append(("fix", f"{one.fix}."))
        rows += [("file", Path(self.path).name), ("kind", self._describe_kind())]
        rows += [(part, str(numbers)) for part, numbers in self.parts.items()]
        if len(self.families) > 1:
            titles = join_titles(map(find_title, self.families))
            rows.append(("for", f"{titles}: all have these modules; the base decides"))
        claimed = find_title(self.family_claimed) or self.family_claimed
        version = self.version_claimed or claimed
        origins = [self.base_model, version, self.base_hash and f"hash {self.base_hash[:16]}"]
        if any(origins):
            rows.append(("its metadata says", ", ".join(dict.fromkeys(filter(None, origins)))))
        if self.experts:
            rows.append(("experts", "{} for high noise, {} for low noise".format(*self.experts)))
        if self.moves:
            rows.append(("moved before", describe_moves(self.moves)))
        if str(self.readers):
            rows.append(("programs", str(self.readers)))
        if self.vectors:
            rows.append(("also", f"trained {write_counts(self.vectors)}"))
        rows += [("stays behind", f"{number} × {why}") for why, number in self.left_out.items()]
        if self.quantised:
            rows.append(("quantised", self.quantised))
        if self.trigger_words:
            rows.append(("trigger words", ", ".join(self.trigger_words)))
        return rows

    def _describe_kind(self) -> str:
        words = [self.format, "authors' names" if self.spelling == "sgm" else ""]
        words += ["needs the base's weights" if self.needs_base else ""]
        count = "1 tensor" if self.tensors == 1 else f"{self.tensors} tensors"
        words += [count, write_counts(self.dtypes), format_size(self.size) if self.size else ""]
        return ", ".join([_KINDS[self.kind], *filter(None, words)])

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON."""
        values = asdict(self) | {"readers": self.readers._asdict(), "family": self.family}
        values["base_match"] = self.base_match and self.base_match.to_dict()
        return values | {"mark": self.mark, "headline": self.headline, "ok": bool(self)}


def explain_differences(loras: Mapping[str, Check]) -> str:
    """Reports which LoRAs are for different models or bases; "" if none is."""
    sure = {name: one for name, one in loras.items() if one.families}
    if sure and not set.intersection(*({*one.families} for one in sure.values())):
        firsts = {one._title: name for name, one in reversed(sure.items())}
        listed = ", ".join(f"{name} for {title}" for title, name in [*firsts.items()][:-5:-1])
        return f"These LoRAs are for different models: {listed}."
    return explain_other_bases({name: one.stated for name, one in loras.items()})


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
