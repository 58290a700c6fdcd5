"""What a LoRA is, and whether it fits a base: `check`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..adapters.algorithms import forms
from ..adapters.contents import parse_contents, read_scale
from ..adapters.family import (
    claimed_family,
    claimed_version,
    guess_families,
    guess_family,
    guess_sizes,
    known_base,
)
from ..adapters.folder import ADAPTER_FILES
from ..adapters.formats.moves import Move, describe_moves, read_moves
from ..adapters.formats.programs import Readers, find_readers
from ..adapters.keys import tensor_keys
from ..adapters.lora import Lora, LoraSource
from ..adapters.naming import list_matrices, most_common_spelling
from ..adapters.slots import Contents, Slot, measure_modules
from ..adapters.training_words import read_training_words
from ..architectures.families import find_title, known_families
from ..architectures.loaders import known_loaders
from ..architectures.modules import TEXT_ENCODERS, find_component
from ..bases import BaseLike, open_base
from ..bases.base import Progress
from ..bases.experts import ExpertsLike
from ..bases.folder import find_expert_folders
from ..core.grouping import group_by
from ..errors import InvalidOption, ProLoRAError, UnrelatedBases
from ..files.dtypes import spell_dtype
from .base_check import is_language_model, join_titles
from .base_fit import BaseFit, fit_base, fit_family
from .by_weights.base_pair import preview_move
from .options import TransferOptions
from .report import InWords, Mark

Kind = Literal["lora", "base", "unknown"]
_TOP_TAGS = 10
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
    fit: BaseFit | None = None  # whether it is for the base that was given
    move: InWords | None = None  # what a transfer between two bases would say

    @property
    def family(self) -> str | None:
        """Its family, where only one fits."""
        return self.families[0] if len(self.families) == 1 else None

    @property
    def ranks(self) -> dict[int, int]:
        """Rank -> number of updates, of all parts."""
        return dict(sorted(sum((Counter(x.ranks) for x in self.parts.values()), Counter()).items()))

    @property
    def mark(self) -> Mark:
        """✔ it can be used as asked, ⚠ perhaps or in part, ✖ it cannot."""
        if self.reason or self.kind == "unknown":
            return "✖"
        marks = [told.mark for told in (self.fit, self.move) if told]
        if self.program and self.kind == "lora" and self.families:
            whole, part = self.readers.whole, self.readers.part
            marks.append("✔" if self.program in whole else "⚠" if self.program in part else "✖")
        return max(marks, key="✔⚠✖".index, default="✔")

    def __bool__(self) -> bool:
        """Whether nothing speaks against it; a move that works in part is worth a try."""
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
        if not self.families:
            return f"of no known family, so that what {self.program} does with it is not known"
        much = "a part of it" if self.program in self.readers.part else "nothing of it"
        return f"{self.program} applies {much}; convert it for that program (`convert()`)"

    def __repr__(self) -> str:
        """Returns one line: the file and the verdict."""
        return f"Check({self.path!r}: {self.mark} {self.headline})"

    def __str__(self) -> str:
        """The mark and the verdict, then the facts, a line each."""
        facts = [f"{name}: {text}" if name else text for name, text in self.facts()]
        return "\n".join([f"{self.mark} {self.headline}", *facts])

    def facts(self) -> list[tuple[str, str]]:
        """Returns what is known of the file, as names and texts."""
        said = (*self.move.lines, *self.move.cautions) if self.move else ()
        found = [("", line) for line in said]
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


def check(
    lora: LoraSource,
    *,
    base: ExpertsLike | None = None,
    family: str | None = None,
    program: str | None = None,
    source: BaseLike | None = None,
    target: BaseLike | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Check:
    """Says what a file is, and whether it is for a base or a program.

    Headers and alphas are read; with `source` and `target` their weights are compared, too, and the
    result says what a transfer would. By
    names and shapes, fine-tunes of one model take each other's LoRAs, and are not told apart.

    Args:
        lora: a .safetensors file, a PEFT folder, an id on the hub or a state dict; a base model is
            described, too.
        base: as `transfer` takes its bases; of a pipeline with two experts the first.
        family: the id of a family ("sdxl"), in the place of a base.
        program: a program that should read it ("comfyui", "diffusers", "forge", …).
        source: the base that the LoRA was trained on, if `target` is given.
        target: the base that it may move to.
        cache: folder that keeps what is learnt of the two; None keeps nothing.
        progress: called as progress(done, total, name).

    Returns:
        The answer, which is true where nothing speaks against it.

    Raises:
        InvalidOption: an unknown program or family, or one base of two.
        UnsupportedFormat: a file cannot be read at all, or a base is none.
        ProLoRAError: what `transfer` refuses, but for models that have nothing in common.
    """
    for name, value, known in (
        ("program", program, known_loaders()),
        ("family", family, known_families()),
    ):
        if value is not None and value not in known:
            raise InvalidOption(f"`{name}` is one of {', '.join(known)}, not {value!r}")
    if (source is None) != (target is None):
        raise InvalidOption("give `source` and `target`, or `base`: a verdict takes two models")
    opened = open_lora(lora)
    found = check_model(lora) if opened is None else check_tensors(opened)
    found = replace(found, program=known_loaders()[program].title if program else "")
    if base is family is source is None:
        return found
    if opened is None or found.kind != "lora":
        return replace(found, reason=found.reason or "a LoRA was asked about")
    if family is not None:
        found = replace(found, fit=fit_family(found.families, family))
    if base is not None:
        found = replace(found, fit=fit_base(opened, base))
    if source is not None and target is not None:
        options = TransferOptions(cache=cache, progress=progress)
        try:
            told = preview_move(lora, open_base(source), open_base(target), options).in_words()
        except UnrelatedBases as error:
            told = InWords("✖", str(error))
        found = replace(found, move=told)
    return found


def open_lora(lora: LoraSource) -> Lora | None:
    """Opens an adapter; None for what can be nothing but a base model."""
    if isinstance(lora, str | os.PathLike):
        path = Path(lora)
        others = os.path.isdir(path) and not any((path / name).exists() for name in ADAPTER_FILES)
        if others or path.suffix.lower() == ".gguf":
            return None
    return Lora.open(lora)


def check_tensors(opened: Lora) -> Check:
    """Says what a file of tensors is: a LoRA, or a base model, or neither."""
    metadata = opened.metadata
    known = known_base(metadata)
    fields = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    named = known[0] if known else next(filter(None, map(metadata.get, fields)), "")
    hashes = map(metadata.get, ("ss_new_sd_model_hash", "ss_sd_model_hash"))
    words = read_training_words(metadata)
    tags = [tag for tag in words.list_tags(_TOP_TAGS) if tag != words.trigger]
    found = Check(
        path=opened.where,
        kind="lora",
        dtypes=count_values(spell_dtype(x.dtype) for x in opened.headers.values()),
        tensors=len(opened.headers),
        size=opened.path.stat().st_size if opened.path else 0,
        # An architecture has the kind of file behind it: stable-diffusion-xl-v1-base/lora.
        base_model=Path(named.removesuffix("/lora")).name if named else "",
        base_hash=next(filter(None, hashes), "") or "",
        family_claimed=claimed_family(metadata) or "",
        version_claimed=claimed_version(metadata) or "",
        trigger_words=tuple([words.trigger, *tags] if words.trigger else tags),
        moves=read_moves(metadata),
    )
    try:
        contents = parse_contents(opened)
        scales = {slot.module.name: read_scale(slot, opened) for slot in contents.slots}
    except ProLoRAError as error:
        return _describe_refused(opened, found, str(error))
    return _describe_contents(opened, contents, scales, found)


def _describe_contents(
    opened: Lora, contents: Contents, scales: Mapping[str, float], found: Check
) -> Check:
    """Describes a LoRA that is read."""
    slots, shapes = contents.slots, measure_modules(contents.slots)
    paths = [slot.module for slot in slots] or [one.module for one in contents.vectors]
    spelling = most_common_spelling(slot.module for slot in slots)
    of_vectors = {name for one in contents.vectors for name in one.module.modules}
    whole = shapes | dict.fromkeys(of_vectors - shapes.keys(), (0, 0))
    families = guess_families(whole, opened.metadata, spelling, list_matrices(opened))
    kinds = count_values([slot.kind for slot in slots] or ["norm"])
    format = "peft" if opened.config is not None else paths[0].format
    # Programs were not tried with other kinds.
    tried = not set(kinds) - {"lora", "locon"}
    language = not families and is_language_model(shapes)
    # Text encoders go last.
    ordered = sorted(slots, key=lambda slot: find_component(slot.module.name) in TEXT_ENCODERS)
    by_part = group_by(ordered, lambda slot: find_component(slot.module.name))
    return replace(
        found,
        reason="it is a language model's, and prolora takes diffusion models alone" * language,
        format=format,
        spelling="sgm" if any(path.sgm for path in paths) else "diffusers",
        algorithms=kinds,
        needs_base=any(forms.needs_base(slot.keys.keys()) for slot in slots),
        families=tuple(families),
        sizes=tuple(guess_sizes(whole)),
        parts={
            name: _describe_part(some, opened, scales)
            for name, some in sorted(by_part.items(), key=lambda item: item[0] in TEXT_ENCODERS)
        },
        modules=count_values(map(find_component, shapes)),
        vectors=count_values("bias" if x.tensor == "bias" else "norm" for x in contents.vectors),
        left_out=count_values(contents.left_out.values()),
        readers=find_readers(families, format, spelling, whole) if tried else Readers(),
    )


def _describe_part(slots: Iterable[Slot], opened: Lora, scales: Mapping[str, float]) -> Part:
    slots = list(slots)
    ranks = Counter(slot.form.rank for slot in slots if slot.form.rank)
    return Part(
        len(slots),
        count_values(slot.kind for slot in slots),
        dict(sorted(ranks.items())),
        count_values(_read_alpha(slot, opened) for slot in slots),
        count_values(f"{scales[slot.module.name]:.4g}" for slot in slots),
    )


def _read_alpha(slot: Slot, opened: Lora) -> str:
    if slot.peft:
        return f"{slot.peft.alpha(slot.module.local):g}"
    key = slot.keys.get("alpha")
    return "none" if key is None else f"{opened.read(key).double().item():g}"


def _describe_refused(opened: Lora, found: Check, reason: str) -> Check:
    """Describes a file that is not read as a LoRA.

    A base, an adapter of another kind, or neither.
    """
    kinds = [tensor_keys.parse_key(key, x.shape, None) for key, x in opened.headers.items()]
    if any(map(tensor_keys.is_base_weight, opened.headers)) and opened.path is not None:
        try:
            return replace(check_model(opened.path), path=found.path, size=found.size)
        except ProLoRAError as error:
            if not any(kinds):
                return replace(found, kind="base", reason=str(error))
    return replace(found, kind="lora" if any(kinds) else "unknown", reason=reason)


def check_model(path: Any) -> Check:
    """Says what a base model is that `transfer` would open."""
    experts = find_expert_folders(Path(path))
    base = open_base(experts[0] if experts else path)
    shapes = {name: (shape[0], shape[1]) for name, shape in base.shapes.items()}
    family = base.family or guess_family(shapes, {})
    is_gguf = Path(path).suffix.lower() == ".gguf"
    form = "diffusers" if os.path.isdir(path) else "gguf" if is_gguf else "single-file"
    return Check(
        path=str(path),
        kind="base",
        format=form,
        families=(family,) if family else (),
        sizes=(base.layout,) if base.layout else (),
        modules=count_values(map(find_component, shapes)),
        dtypes=count_values(str(dtype).removeprefix("torch.") for dtype in base.dtypes.values()),
        tensors=len(shapes),
        quantised=base.quantised_as,
        size=sum(file.stat().st_size for file in base.files),
        experts=tuple(folder.name for folder in experts),
    )


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
