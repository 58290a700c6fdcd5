"""Who takes part in an evaluation: the LoRAs, what they became, and what is drawn of each."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...adapters.adapter import Adapter
from ...adapters.training_words import read_training_words
from ...architectures.modules import is_in_text_encoder
from ...bases import Base
from ...core.lowrank import LowRank
from ...core.methods import MethodChoice
from ...errors import InvalidOption, MissingFile, ProLoRAError, WrongBase
from ...files.hub import find_hub_id
from ...probe.default_prompts import derive_prompts
from ..by_weights.base_pair import move_lora, read_lora
from ..check import check
from ..evaluation_options import EvaluationOptions
from ..fleet.listing import list_loras
from ..output_paths import name_output
from ..plan import explain_other_shape

StrPath = str | os.PathLike[str]
SOURCE, WITH_LORA, TARGET, COPY = "source", "source + LoRA", "target", "copy"
TRAINED_THERE = "trained"
"""Rows that every evaluation has, the last where a LoRA trained on the target is given."""


@dataclass(frozen=True)
class Entrant:
    """A row of one LoRA: a model, and what runs beside its weights.

    Attributes:
        side: 0 the source, 1 the target.
        denoiser: updates of its UNet or transformer.
        text: updates of its text encoders.
        unheard: number of trained biases and norms, of updates that could not be read, and of those
            of text encoders that this model does not have: none of them is drawn.
    """

    side: int
    denoiser: Mapping[str, LowRank] = field(default_factory=dict)
    text: Mapping[str, LowRank] = field(default_factory=dict)
    unheard: int = 0

    @classmethod
    def of(cls, side: int, adapter: Adapter, base: Base) -> Entrant:
        """The model of a side with a LoRA."""
        text = {name: u for name, u in adapter.updates.items() if is_in_text_encoder(name)}
        rest = {name: u for name, u in adapter.updates.items() if name not in text}
        placed = {
            name: u
            for name, u in text.items()
            if name in base.shapes and explain_other_shape(name, tuple(u.shape), base) is None
        }
        unheard = len(adapter.vectors) + len(adapter.unread) + len(text) - len(placed)
        return cls(side, rest, placed, unheard)

    @property
    def norm(self) -> float:
        """‖ΔW‖_F of all updates of the UNet or transformer together."""
        return math.sqrt(sum(float(update.norm()) ** 2 for update in self.denoiser.values()))


@dataclass(frozen=True)
class Subject:
    """One LoRA of an evaluation.

    Attributes:
        name: of its file.
        prompts: that its images are drawn of.
        entrants: row -> what is drawn.
        failures: row that could not be made by weights -> why.
    """

    name: str
    prompts: tuple[str, ...]
    entrants: Mapping[str, Entrant]
    failures: Mapping[str, str]


def read_subjects(
    lora: StrPath | Sequence[StrPath],
    moved: Sequence[StrPath] | Mapping[str, StrPath],
    bases: tuple[Base, Base],
    options: EvaluationOptions,
) -> list[Subject]:
    """Reads every LoRA, and moves those that are to be moved; no model runs.

    Args:
        lora: as `evaluate` takes it.
        moved: likewise.
        bases: source and target.
        options: of the evaluation.

    Raises:
        InvalidOption: two LoRAs or two rows of one name.
        ProLoRAError: a LoRA that cannot be read, or does not belong to its model.
    """
    loras = [lora] if isinstance(lora, str | os.PathLike) else lora
    listed = [
        [Path(one)] if find_hub_id(one) else [found.path for found in list_loras(one)]
        for one in loras
    ]
    paths = list(dict.fromkeys(itertools.chain.from_iterable(listed)))
    if not isinstance(moved, Mapping):
        moved = _key_by_name({Path(path).name.removesuffix(".safetensors"): path} for path in moved)
    rows = {row: "" for row in (SOURCE, WITH_LORA, TARGET, TRAINED_THERE, COPY, *options.methods)}
    _key_by_name([rows, moved])
    _key_by_name({path.name: path} for path in paths)
    places = {**moved, **({TRAINED_THERE: options.trained} if options.trained else {})}
    is_one = isinstance(lora, str | os.PathLike) and paths in (
        [Path(lora)],
        [Path(os.path.abspath(lora))],
    )
    several = not is_one
    files = {
        path: {row: _find_file(place, path, several) for row, place in places.items()}
        for path in paths
    }
    subjects = [_read_subject(path, files[path], bases, options) for path in paths]
    # As many prompts of each, so that means are of the same weight.
    least = min(len(subject.prompts) for subject in subjects)
    return [replace(subject, prompts=subject.prompts[:least]) for subject in subjects]


def _key_by_name(parts: Iterable[Mapping[str, StrPath]]) -> dict[str, StrPath]:
    """Several mappings as one.

    Raises:
        InvalidOption: two have a key in common.
    """
    named: dict[str, StrPath] = {}
    for part in parts:
        if twice := named.keys() & part.keys():
            raise InvalidOption(f"two rows or LoRAs are called {twice.pop()!r}: rename the file")
        named |= part
    return named


def _find_file(place: StrPath, lora: Path, several: bool) -> Path:
    """What a LoRA became: the file itself, or that of the LoRA's name in a folder; perhaps an id.

    Raises:
        MissingFile: it is not there.
    """
    path = Path(place) / lora.name if several else Path(place)
    if several and not os.path.exists(path):  # the result of an id has a suffix
        named = Path(place) / name_output(lora, "auto")
        path = named if os.path.exists(named) else path
    if not (os.path.exists(path) or find_hub_id(path)):
        more = "; for several LoRAs, a folder needs a file of the same name for each"
        raise MissingFile(f"{path}: no such LoRA{more if several else ''}")
    return path


def _read_subject(
    path: Path, files: Mapping[str, Path], bases: tuple[Base, Base], options: EvaluationOptions
) -> Subject:
    source, target = bases
    adapter = _read_fitting(path, source)
    entrants = {SOURCE: Entrant(0), WITH_LORA: Entrant.of(0, adapter, source), TARGET: Entrant(1)}
    read = {row: Entrant.of(1, _read_fitting(file, target), target) for row, file in files.items()}
    failures: dict[str, str] = {}
    methods: dict[MethodChoice, None] = dict.fromkeys(("copy", *options.methods))
    for method in methods:
        try:
            done = move_lora(adapter, source, target, options.as_moved(method), hashed=False)
            entrants[method] = Entrant.of(1, done.adapter, target)
        except ProLoRAError as error:
            failures[method] = str(error)
    prompts = options.sampling.prompts or derive_prompts(read_training_words(adapter.metadata))
    return Subject(path.name, tuple(dict.fromkeys(prompts)), entrants | read, failures)


def _read_fitting(path: Path, base: Base) -> Adapter:
    """A LoRA, every update of which has its place in a base.

    Raises:
        WrongBase: it has not.
        ProLoRAError: it cannot be read.
    """
    checked = check(path, base)
    if checked.coverage < 1:
        raise WrongBase(f"{path}: as a LoRA of {base.name}: {checked.sentence}")
    return read_lora(path, base)
