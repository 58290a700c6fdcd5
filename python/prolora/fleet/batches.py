"""Batches of LoRAs between one pair of bases: the same work wherever it is done."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..adapters.lora import Lora
from ..bases.experts import open_experts, pair_experts
from ..errors import OutputError, OutputExists, ProLoRAError
from ..files.state import read_state
from ..files.store import Store, failure_note
from ..moving.base_pair import BasePair
from ..reports.outcome import Outcome
from ..verbs.batch import LORA_FAILURES, as_refusal
from ..verbs.option_fields import option
from ..verbs.options import OUTPUT, TransferOptions
from ..verbs.output_paths import make_folders, name_output
from ..verbs.result import Recipe, save_result
from ..version import __version__

_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class MigrationOptions(TransferOptions):
    """How a collection is moved; `migrate` takes each of these by its name."""

    verify: bool = option(
        False,
        "Read the tensors of all results that are there, not only of changed files.",
        decides=False,
        panel=OUTPUT,
    )


DEFAULT_MIGRATION = MigrationOptions()


@dataclass(frozen=True)
class Migrated:
    """What became of one LoRA on its way to one target."""

    lora: str
    target: str  # the folder below that of the results
    status: Literal["moved", "already there", "would move", "refused"]
    out: str = ""
    error: str = ""
    unread: int = 0  # updates that could not be read and stayed behind


@dataclass(frozen=True)
class Batch:
    """LoRAs between one pair of bases, as paths on every machine."""

    source: str
    target: str
    expert: str
    loras: tuple[tuple[str, str], ...]  # each with the suffix of its result's name

    @property
    def label(self) -> str:
        """The folder of its results: the name of the target."""
        place = Path(self.target)
        if place.name in ("unet", "transformer") and place.parent.name:
            place = place.parent
        name = place.stem if place.suffix in (".safetensors", ".gguf") else place.name
        return re.sub(r"[^\w.-]+", "_", name).strip(".") or "target"


@dataclass(frozen=True)
class Job:
    """What all batches have in common; it can be pickled."""

    folder: str
    options: MigrationOptions
    version: str = __version__

    @property
    def store(self) -> Store:
        """The results, by the names of their targets."""
        return Store(Path(self.folder))

    def place_note(self, batch: Batch, lora: Path) -> Path:
        """Returns the place whose note says why a LoRA was refused."""
        return self.store.path(batch.label, str(lora), title=lora.stem, digits=_DIGITS)


def plan_batch(batch: Batch, job: Job) -> Iterator[Migrated]:
    """Describes what would become of the LoRAs of a batch."""
    pair = BasePair.open(*_find_pair(batch), job.options, dry_run=True)
    for lora, _ in batch.loras:
        try:
            pair.preview(lora)
            yield Migrated(lora, batch.label, "would move")
        except ProLoRAError as error:
            yield Migrated(lora, batch.label, "refused", error=str(error))


def _find_pair(batch: Batch) -> tuple[Any, Any]:
    pairs = pair_experts(open_experts(batch.source), open_experts(batch.target))
    pair = next(pair for pair in pairs if pair.expert == batch.expert)
    return pair.source, pair.target


_opened: dict[str, BasePair] = {}


def _open_bases(batch: Batch, job: Job) -> BasePair:
    """Opens a batch's bases, which stay open for the next batch."""
    source, target = _find_pair(batch)
    states = [read_state(file) for base in (source, target) for file in base.files]
    key = repr((batch.source, batch.target, batch.expert, job, states))
    if key not in _opened:
        _opened.clear()
        _opened[key] = BasePair.open(source, target, job.options)
        _opened[key].match_blocks()
    return _opened[key]


def move_batch(batch: Batch, job: Job) -> Iterator[Migrated]:
    """Moves the LoRAs of a batch; current results are done."""
    pair, memory = _open_bases(batch, job), Path(job.options.cache or Path(job.folder, ".prolora"))
    make_folders([Path(job.folder) / batch.label])
    for name, appended in batch.loras:
        lora, out = Path(name), Path()
        try:
            with Lora.open(lora) as opened:
                recipe = Recipe(opened, pair.source, pair.target, job.options, memory)
                plain = name_output(lora, job.options.format or "auto", appended)
                title, suffix, _ = plain.partition(".safetensors")
                named = {"title": title, "suffix": suffix}
                out = job.store.path(batch.label, recipe.made_of, digits=_DIGITS, **named)
                if out.is_symlink():  # made again, it would replace somebody's file
                    raise OutputError(f"{out}: is a link, and no result of prolora; remove it")
                exists = out.exists()
                if exists and recipe.judge(out, verify=job.options.verify) == "current":
                    yield Migrated(name, batch.label, "already there", str(out))
                    continue
                done = save_result(recipe.make(pair.transfer), out, overwrite=exists)
                recipe.remember_result(out)
            outcome = Outcome(lora, out, done.report)
        except LORA_FAILURES as error:
            outcome = Outcome(lora, out, error=as_refusal(error))
        yield _report_outcome(batch, job, outcome)


def _report_outcome(batch: Batch, job: Job, outcome: Outcome) -> Migrated:
    """Reports what became of a LoRA; raises what would stop the next one, too."""
    lora, error = outcome.lora, outcome.error
    was_there = isinstance(error, OutputExists)  # another process was faster
    if error is not None and not was_there:
        if isinstance(error.__cause__, OSError) and lora.exists():
            raise error
        return note_refusal(batch, job, lora, error)
    failure_note(job.place_note(batch, lora)).unlink(missing_ok=True)
    status: Any = "already there" if was_there else "moved"
    return Migrated(str(lora), batch.label, status, str(outcome.out), unread=len(outcome.unread))


def note_refusal(batch: Batch, job: Job, lora: Path, error: BaseException) -> Migrated:
    """Writes down why a LoRA was not moved; its next success removes the note."""
    place = job.place_note(batch, lora)
    job.store.refuse(place, as_refusal(error), lora=str(lora))
    return Migrated(str(lora), batch.label, "refused", str(failure_note(place)), str(error))
