"""Many LoRAs at once: each weight is looked at once for all of them, one bad file stops no other.

LoRAs are taken a few at a time, as many as memory allows. What a later group needs of the weights
is in the basis cache by then.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from ..bases import Base
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.experts import Experts, ExpertsLike, choose_pairs, open_experts, pair_experts
from ..bases.memory import Memory
from ..comparison.block_matching import resolve_match
from ..comparison.contested_blocks import InsertedMode
from ..comparison.module_map import Match
from ..comparison.verdict import DEFAULT_THRESHOLD
from ..comparison.width_selection import WidthFinder
from ..core.methods import Needs
from ..core.precision import in_full_precision
from ..core.projection import DEFAULT_RANK
from ..core.rank_rule import Rank
from ..errors import OutputError, ProLoRAError
from ..probe.settings import Probing
from .by_weights.decision import decide_method
from .by_weights.file_budget import OutputForm
from .by_weights.job import Job
from .by_weights.lora_work import LORA_FAILURES, estimate_bytes
from .by_weights.move_updates import move_all
from .by_weights.pipeline import finish_job, list_inputs, prepare_job
from .by_weights.slicing import slice_source
from .options import (
    DEFAULT_PROBING,
    DroppedMode,
    DtypeLike,
    FormatLike,
    MethodChoice,
    Strength,
    TextEncoderMode,
    TransferOptions,
    VectorsMode,
)
from .out_rank import OutRank
from .output_paths import check_name, check_output, name_outputs
from .report import Outcome, Report
from .resume import Recipe
from .transfer import Transfer, run_transfer_file, save_result


@dataclass
class _Task:
    """One LoRA of several, on its way to an outcome."""

    lora: Path
    out: Path
    recipe: Recipe | None = None
    job: Job | None = None
    outcome: Outcome | None = None
    seconds: float = 0.0

    def attempt(self, step: Callable[[], Any]) -> Any:
        """Does a step and times it; an error ends this LoRA and no other."""
        if self.outcome:
            return None
        started = time.perf_counter()
        try:
            return step()
        except LORA_FAILURES as error:
            self.job = None
            self.outcome = Outcome(
                self.lora, self.out, error=_as_refusal(error), seconds=self.seconds
            )
            return None
        finally:
            self.seconds += time.perf_counter() - started

    def finish(self, report: Report | None) -> None:
        """Notes the report as the outcome, if there is one."""
        if report is not None:
            self.outcome = Outcome(self.lora, self.out, report=report, seconds=self.seconds)


def _as_refusal(error: BaseException) -> ProLoRAError:
    """An error of the system or of torch, as one that names itself."""
    if isinstance(error, ProLoRAError):
        return error
    refusal = ProLoRAError(f"{type(error).__name__}: {error}".rstrip(": "))
    refusal.__cause__ = error
    return refusal


@in_full_precision
def transfer_many(
    loras: Iterable[str | PathLike[str]],
    source: ExpertsLike | Experts,
    target: ExpertsLike | Experts,
    folder: str | PathLike[str],
    *,
    redo: bool = False,
    method: MethodChoice = "auto",
    rank: Rank = DEFAULT_RANK,
    match: Match = "name",
    threshold: float = DEFAULT_THRESHOLD,
    damping: float | None = None,
    strength: Strength | None = None,
    out_rank: OutRank = "exact",
    dropped: DroppedMode = "skip",
    inserted: InsertedMode = "skip",
    text_encoder: TextEncoderMode = "copy",
    vectors: VectorsMode = "copy",
    min_coverage: float = 0.0,
    again: bool = False,
    format: FormatLike = "auto",
    dtype: DtypeLike | None = None,
    cache: str | PathLike[str] | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    probe: Probing = DEFAULT_PROBING,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Moves LoRAs into a folder, under the names they have (with the suffix the format needs).

    A result that is there already, complete, and says in its header that it was made of this very
    LoRA, of these bases and in this way is left alone (unless `redo` is set): a run that was cut
    off goes on where it was. The folder is made if it does not exist.

    Every option has the meaning that it has in `transfer`. Without `cache` what is learnt of the
    bases is kept for this call only; `progress` is called as progress(done, total,
    "LoRAs: module").

    A model of two experts (Wan 2.2) is given as the folder of its pipeline, or as (high noise, low
    noise). A LoRA whose name has "high_noise" or "low_noise" in it, "HIGH" or "LOW" in capitals, or
    either of these words at its end, is moved to that expert. Any other is moved to both, and the
    names of its results end in "_high_noise" and "_low_noise".

    Returns:
        An outcome for each LoRA and each expert that it is moved to, in order. A LoRA that is
        refused does not stop the others.

    Raises:
        OutputError: the folder cannot be made, or two inputs would have one output.
        UnsupportedFormat: the source alone has experts, and a LoRA's name does not tell one.
        ProLoRAError: a base that cannot be opened, or two that cannot be matched by similarity.
    """
    options = TransferOptions(
        method=method,
        rank=rank,
        match=match,
        threshold=threshold,
        damping=damping,
        strength=strength,
        out_rank=out_rank,
        dropped=dropped,
        inserted=inserted,
        text_encoder=text_encoder,
        vectors=vectors,
        min_coverage=min_coverage,
        again=again,
        cache=cache,
        device=device,
        max_memory=max_memory,
        probe=probe,
        progress=progress,
    )
    output = OutputForm.of(options, format, dtype)
    pairs = pair_experts(open_experts(source), open_experts(target))
    moves = [
        (Path(lora), pair, appended)
        for lora in loras
        for pair, appended in choose_pairs(Path(lora), pairs)
    ]
    check_name(folder)
    names = [lora for lora, _, _ in moves], [appended for _, _, appended in moves]
    outputs = name_outputs(names[0], Path(folder), format, names[1])
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder}: the output folder cannot be made: {error}") from error
    outcomes: dict[Path, Outcome] = {}
    with BasisCache(options.cache).saving() as opened:
        for pair in pairs:
            mine = [(m[0], out) for m, out in zip(moves, outputs, strict=True) if m[1] is pair]
            if mine:
                inputs = [lora for lora, _ in mine]
                batch = _Batch.open(inputs, pair.source, pair.target, options, output, opened)
                tasks = batch.list_tasks([out for _, out in mine], redo, opened)
                batch.run([task for task in tasks if task.outcome is None], opened)
                outcomes |= {task.out: task.outcome for task in tasks if task.outcome is not None}
    return [outcomes[out] for out in outputs if out in outcomes]


@dataclass(frozen=True)
class _Batch:
    """LoRAs between the same two bases.

    Attributes:
        loras: all of them.
        source, target: the bases.
        asked: the options as they were given.
        chosen: the same with blocks matched, and no progress: each group labels its own.
        output: what the results are written as.
        memory: what may be in memory at a time.
        widths: what is known of a target that is narrower than the source.
        inputs: what no output may overwrite: the LoRAs that are there, and the bases.
    """

    loras: list[Path]
    source: Base
    target: Base
    asked: TransferOptions
    chosen: TransferOptions
    output: OutputForm
    memory: Memory
    widths: WidthFinder
    inputs: list[Path]

    @classmethod
    def open(
        cls,
        loras: list[Path],
        source: Base,
        target: Base,
        asked: TransferOptions,
        output: OutputForm,
        cache: BasisCache,
    ) -> _Batch:
        """Matches the blocks of the bases once, for all LoRAs."""
        match = resolve_match(
            asked.match,
            source,
            target,
            inserted=asked.inserted,
            cache=cache,
            device=asked.device,
            max_memory=asked.max_memory,
            progress=asked.progress,
        )
        chosen = replace(asked, match=match, progress=None)
        memory = Memory(asked.memory_limit, asked.rank, asked.device)
        # A path that cannot be looked at is no file that could be overwritten.
        inputs = [lora for lora in loras if os.path.exists(lora)] + [*source.files, *target.files]
        widths = WidthFinder(source, target, asked.device)
        return cls(loras, source, target, asked, chosen, output, memory, widths, inputs)

    def list_tasks(self, outputs: list[Path], redo: bool, cache: BasisCache) -> list[_Task]:
        """A task for every LoRA; those whose result is there already are done."""
        tasks = [_Task(lora, out) for lora, out in zip(self.loras, outputs, strict=True)]
        for task in tasks:
            task.attempt(partial(self._look_up, task, redo, cache))
        return tasks

    def _look_up(self, task: _Task, redo: bool, cache: BasisCache) -> None:
        task.recipe = Recipe.of(task.lora, self.source, self.target, self.asked, self.output)
        if not redo and task.recipe.is_made(task.out, cache):
            task.outcome = Outcome(task.lora, task.out, kept=True)

    def run(self, tasks: list[_Task], cache: BasisCache) -> None:
        """Does the tasks, in groups that fit into memory."""
        groups = list(_group_tasks(tasks, self.memory))
        with _keep_bases(cache, self.chosen, len(groups)) as kept:
            for group in groups:
                progress = _label_progress(group, self.loras, self.asked.progress)
                if self.chosen.runs_models:
                    self._probe_in_turn(group, progress)
                else:
                    self._move_group(group, kept, progress)
                kept.save()

    def _probe_in_turn(self, group: list[_Task], progress: Progress | None) -> None:
        """Method "probe": one LoRA after the other, each with the models for itself."""
        options = replace(self.asked, progress=progress)
        for task in group:

            def move(task: _Task = task) -> Report:
                check_output(task.out, self.inputs)
                return run_transfer_file(
                    task.lora, self.source, self.target, task.out, options, self.output
                )

            task.finish(task.attempt(move))

    def _move_group(self, group: list[_Task], cache: BasisCache, progress: Progress | None) -> None:
        """The stages of a transfer by weights, for several LoRAs together."""

        def show(done: int, what: str) -> None:
            if progress:
                progress(done, len(group), what)

        for i, task in enumerate(group):
            show(i, f"reading {task.lora.name}")
            task.attempt(partial(self._prepare, task, cache))
        # One for all, so that each weight is looked at once.
        plans = [task.job.plan for task in group if task.job is not None]
        bases = slice_source(self.source, plans), self.target
        results = 0
        for task in group:
            if task.job is not None:
                results += task.job.work.result_bytes()
                decide = partial(decide_method, task.job, *bases, cache, self.memory, results)
                task.job = task.attempt(decide)
        jobs = [task.job for task in group if task.job is not None]
        started = time.perf_counter()
        works = [job.work for job in jobs]
        move_all(works, *bases, cache, self.memory, progress)
        share = (time.perf_counter() - started) / max(1, len(jobs))
        for i, task in enumerate(group):
            if task.job is None:
                continue
            show(i, f"writing {task.lora.name}")
            task.seconds += share
            report = task.attempt(partial(self._finish, task, task.job, bases, cache))
            task.job = None  # its factors are on the disk now
            task.finish(report)
        show(len(group), "")

    def _prepare(self, task: _Task, cache: BasisCache) -> None:
        check_output(task.out, self.inputs)
        task.job = prepare_job(
            task.lora, self.source, self.target, self.chosen, self.output, cache, self.widths
        )

    def _finish(self, task: _Task, job: Job, bases: tuple[Base, Base], cache: BasisCache) -> Report:
        notes = task.recipe.describe if task.recipe else None
        result = finish_job(job, *bases, cache, notes)
        inputs = list_inputs(task.lora, self.source, self.target)
        return save_result(Transfer(result.adapter, result.report, inputs), task.out, self.output)


def _group_tasks(tasks: list[_Task], memory: Memory) -> Iterator[list[_Task]]:
    """The LoRAs in groups that fit into memory, at least one each."""
    group: list[_Task] = []
    size = 0
    for task in tasks:
        more = estimate_bytes(task.lora)
        if group and size + more > memory.lora_bytes:
            yield group
            group, size = [], 0
        group.append(task)
        size += more
    if group:
        yield group


@contextmanager
def _keep_bases(cache: BasisCache, options: TransferOptions, groups: int) -> Iterator[BasisCache]:
    """The cache; where there is no folder, what is needed again goes to a temporary one."""
    may_factorise = options.chosen is None or options.chosen.needs is Needs.BASES
    if options.cache is None and groups > 1 and may_factorise:
        with tempfile.TemporaryDirectory(prefix="prolora-") as temporary:
            yield BasisCache(temporary)
    else:
        yield cache


def _label_progress(
    group: list[_Task], loras: list[Path], progress: Progress | None
) -> Progress | None:
    """The caller's callback; it is told which LoRAs are at work."""
    if progress is None:
        return None
    first, last = (loras.index(task.lora) + 1 for task in (group[0], group[-1]))
    of = f"{first}" if first == last else f"{first}–{last}"
    label = f"LoRA {of} of {len(loras)}"
    return lambda done, total, name: progress(done, total, f"{label}: {name}")
