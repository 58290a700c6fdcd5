"""What the fits between the same two pipelines share: open models, and a folder of parts."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

from ..adapters.trigger_words import read_training_words
from ..bases import Base
from ..bases.cache.basis_cache import default_folder
from ..bases.memory import resident_bytes
from ..bases.pipeline_files import draws_in_few_steps, is_pipeline
from ..bases.pipeline_identity import describe_pipeline_folder, digest_facts
from ..core.lowrank import LowRank
from ..core.validation import DeviceLike
from ..errors import TooLittleMemory, UnrelatedBases
from ..files.sizes import format_size
from ..files.state import FileState, read_state
from .default_prompts import derive_prompts
from .fit_plan import FitJob, LoraParts
from .kept_parts import KeptParts
from .pipelines.pipeline import Pipeline, run_text_encoders_beside
from .pipelines.pipeline_opening import open_pipeline
from .pipelines.stages import estimate_bytes
from .pipelines.vram import is_card
from .settings import FitSettings

PARTS = ".prolora-parts"
"""The folder of parts that were not asked for, beside the results until all are made."""


def watch_pipelines(source: Base, target: Base) -> Callable[[], dict[str, str]] | None:
    """Returns what digests two pipelines after their use; None where one is no pipeline.

    A digest is "" where a file has changed meanwhile.
    """
    sides = {"source": source.path, "target": target.path}
    folders = {side: path for side, path in sides.items() if path and is_pipeline(path)}
    if len(folders) < len(sides):
        return None
    known = default_folder()  # remembers digests, where there is a cache at all
    memory, before = known if known.is_dir() else None, _read_states(folders)

    def digest() -> dict[str, str]:
        facts = {side: describe_pipeline_folder(x, memory) for side, x in folders.items()}
        same = _read_states(folders) == before
        return {side: digest_facts(x) if same else "" for side, x in facts.items()}

    return digest


def _read_states(folders: Mapping[str, Path]) -> dict[Path, FileState]:
    files = (file for folder in folders.values() for file in folder.rglob("*"))
    return {file: read_state(file) for file in files if file.is_file()}


class FitSession:
    """Open pipelines and a folder of parts, for one fit or several.

    Attributes:
        folder: where parts are kept; None keeps nothing.
        is_temporary: the folder was not asked for. Then parts that the next LoRA cannot use are
            removed from it.
    """

    def __init__(self, folder: str | PathLike[str] | None, is_temporary: bool = False) -> None:
        """Takes the folder; opens nothing."""
        self.folder = None if folder is None else Path(folder)
        self.is_temporary = is_temporary
        self._models: dict[str, Pipeline] = {}
        self._kept: KeptParts | None = None

    @classmethod
    @contextlib.contextmanager
    def share(
        cls, resume: str | PathLike[str] | None, folder: Path, several: bool
    ) -> Iterator[FitSession]:
        """Yields the session of several fits into a folder, while they go on."""
        if resume is not None or not several:
            yield cls(resume)
            return
        parts = folder / PARTS  # what a killed run has left there goes on
        try:
            yield cls(parts, is_temporary=True)
        finally:
            shutil.rmtree(parts, ignore_errors=True)

    def open_parts(self, source: Base, target: Base) -> KeptParts:
        """Returns the kept parts of these two pipelines."""
        if self._kept is None:
            self._kept = KeptParts(self.folder, watch_pipelines(source, target))
        return self._kept

    @contextlib.contextmanager
    def open_models(
        self, job: FitJob, lora: LoraParts
    ) -> Iterator[tuple[tuple[Pipeline, Pipeline], FitSettings]]:
        """Opens both pipelines of a fit, or takes them as the last fit left them.

        They encode the prompts in turn: the first's text encoders make room. Pipelines that an
        error has left in the middle of something are opened anew.
        """
        with contextlib.ExitStack() as stack:
            try:
                settings = self._choose_settings(job)
                yield self._open_both(job, lora, settings, stack), settings
            except UnrelatedBases:
                raise  # the verdict, when all is done
            except BaseException:
                self._models.clear()
                raise
            finally:
                if self.is_temporary and self._kept is not None:
                    self._kept.remove_own_parts()

    def _choose_settings(self, job: FitJob) -> FitSettings:
        """Fills in prompts from the LoRA's header, and the precision that a card allows."""
        words = read_training_words(job.adapter.metadata)
        settings = replace(job.options, prompts=job.options.prompts or derive_prompts(words))
        return replace(settings, precision=job.card.precision) if job.card else settings

    def _open_both(
        self, job: FitJob, lora: LoraParts, settings: FitSettings, stack: contextlib.ExitStack
    ) -> tuple[Pipeline, Pipeline]:
        """Opens both in turn; `stack` keeps what runs beside text encoders in place."""
        options, card = job.options, job.card
        source, target = job.folders
        for model in self._models.values():  # the weights of the fit before
            model.release(keep_denoiser=False)
        if card is not None:  # blocks that were swapped are not read again in place
            self._models.clear()
        if options.memory_limit is not None:
            check_memory(options.memory_limit, source, target, options.device)
        ours = self._open("source", source, job, lora.carried, stack)
        with run_text_encoders_beside(ours, lora.text):
            ours.encode_prompts(settings)
        ours.encode_prompts(settings)
        self._settle(ours, job, 0)
        theirs = self._open("target", target, job, lora.carried, stack)
        theirs.few_steps = bool(draws_in_few_steps(job.target))
        theirs.encode_prompts(theirs.derive_target_settings(settings))
        self._settle(theirs, job, 1)
        return ours, theirs

    def _open(
        self,
        side: str,
        folder: Path,
        job: FitJob,
        carried: Mapping[str, LowRank],
        stack: contextlib.ExitStack,
    ) -> Pipeline:
        if side not in self._models:
            # Text encoders of a pipeline on a bounded card run in the machine's memory.
            self._models[side] = open_pipeline(folder, None if job.card else job.options.device)
        stack.enter_context(run_text_encoders_beside(self._models[side], carried))
        return self._models[side]

    @staticmethod
    def _settle(model: Pipeline, job: FitJob, number: int) -> None:
        """Frees the text encoders, and brings all else where it runs."""
        model.release_encoders()
        if job.card is not None and job.options.device is not None:
            model.move_to_card(str(job.options.device), job.card.rooms[number], job.card.tile)
        else:
            model.restore()


def check_memory(limit: int, source: Path, target: Path, device: DeviceLike) -> None:
    """Refuses a bound that the models alone exceed, before they are loaded."""
    (ours, others), (theirs, rest) = (estimate_bytes(path) for path in (source, target))
    on_host = not is_card(device)
    least = resident_bytes() + max(ours + others, theirs + rest + (others if on_host else 0))
    if least > limit:
        raise TooLittleMemory(
            f"a bound of {format_size(limit)} on memory is too little: the two pipelines alone "
            f"need {format_size(least)} at a time"
        )


def watch_memory(limit: int | None) -> Callable[[float], None]:
    """Returns what refuses a bound once a share of a stage is done."""
    loaded = resident_bytes() if limit is not None else 0

    def check(share: float) -> None:
        taken = resident_bytes() if limit is not None else 0
        if limit is not None and taken > limit:
            needed = loaded + (taken - loaded) / share
            raise TooLittleMemory(
                f"a bound of {format_size(limit)} on memory is too little: with {share:.0%} of a "
                f"stage done this run takes {format_size(taken)}, and will need about "
                f"{format_size(needed)}; sample fewer images, or in fewer steps"
            )

    return check
