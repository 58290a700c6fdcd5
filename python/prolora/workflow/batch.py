"""Many LoRAs at once: each weight is looked at once for all of them, one bad file stops no other.

LoRAs are taken a few at a time, as many as memory allows. What a later group needs of the weights
is in the basis cache by then.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from ..adapters.unread import PEFT_CONFIG, open_adapter
from ..bases import Base, open_base
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.memory import Memory
from ..comparison.block_matching import resolve_match
from ..errors import OutputError, ProLoRAError
from .file_budget import OutputForm
from .move_updates import move_all, weights_needed
from .options import PROBE, Options
from .report import Report
from .resume import is_made, make_recipe
from .transfer import Job, check_output, decide_method, finish_job, prepare_job, transfer_file

# Bytes in memory for each number of a LoRA: float32 before the move, twice the rank after it.
BYTES_A_NUMBER = 12


@dataclass(frozen=True)
class Outcome:
    """What became of one LoRA: a report, or the error that says why there is none.

    Attributes:
        lora: the input.
        out: where the result is, or would have been.
        report: None if it failed, or was there already.
        error: None if it did not fail.
        kept: whether the result was there already, made of the same LoRA in the same way.
        seconds: wall time; of what was done for several LoRAs at once, its share.
    """

    lora: Path
    out: Path
    report: Report | None = None
    error: ProLoRAError | None = None
    kept: bool = False
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """In two words."""
        if self.error:
            return "failed"
        return "already there" if self.kept else "moved"

    def to_dict(self) -> dict[str, Any]:
        """The report, or the error's name and message, ready for JSON."""
        found: dict[str, Any] = {
            "lora": str(self.lora),
            "out": str(self.out),
            "status": self.status,
        }
        if self.error:
            found["error"] = {"type": type(self.error).__name__, "message": str(self.error)}
        return found | (self.report.to_dict() if self.report else {})


@dataclass
class _Task:
    """One LoRA of a folder."""

    lora: Path
    out: Path
    notes: dict[str, str]
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
        except ProLoRAError as error:
            self.job = None
            self.outcome = Outcome(self.lora, self.out, error=error, seconds=self.seconds)
            return None
        finally:
            self.seconds += time.perf_counter() - started


def transfer_many(
    loras: Iterable[str | PathLike[str]],
    source: Any,
    target: Any,
    folder: str | PathLike[str],
    *,
    format: str = "auto",
    dtype: Any = None,
    redo: bool = False,
    **options: Any,
) -> list[Outcome]:
    """Moves LoRAs into a folder, under the names they have (with the suffix the format needs).

    A result that is there already, whole, and says in its header that it was made of this very
    LoRA, of these bases and in this way is left alone: a run that was cut off goes on where it was.

    Args:
        loras: files or PEFT folders.
        source: base they were trained on, as `transfer` takes it.
        target: base they shall move to.
        folder: made if it does not exist.
        format: as `Transfer.save` takes it.
        dtype: likewise.
        redo: also make again what is there already.
        **options: see `options.Options`. Without `cache` what is learnt of the bases is kept for
            this call only; `progress` is called as progress(done, total, "LoRAs: module").

    Returns:
        An outcome for each LoRA, in order. A LoRA that is refused does not stop the others.

    Raises:
        OutputError: the folder cannot be made, or two inputs would have one output.
        ProLoRAError: a base that cannot be opened, or two that cannot be matched by similarity.
    """
    inputs, folder = [Path(lora) for lora in loras], Path(folder)
    names = [_output_name(lora, format) for lora in inputs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OutputError(f"two inputs would become {twice[0]} and overwrite each other")
    asked = Options(**options)
    source, target = open_base(source), open_base(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the output folder cannot be made: {error}") from error
    matched = resolve_match(
        asked.match, source, target, cache=asked.cache, device=asked.device, progress=asked.progress
    )
    chosen = replace(asked, match=matched, progress=None)
    memory = Memory(chosen.max_memory, rank=chosen.rank)
    with BasisCache(asked.cache).saving() as cache:
        tasks = []
        for lora, name in zip(inputs, names, strict=True):
            notes = make_recipe(lora, source, target, asked, format, dtype, cache)
            task = _Task(lora, folder / name, notes)
            if not redo and is_made(task.out, notes):
                task.outcome = Outcome(lora, task.out, kept=True)
            tasks.append(task)
    groups = list(_group_tasks([task for task in tasks if task.outcome is None], memory))
    with _open_cache(chosen, len(groups)) as cache:
        for group in groups:
            progress = _label_progress(group, inputs, asked.progress)
            if chosen.method == PROBE:
                settings = options | {"progress": progress, "format": format, "dtype": dtype}
                for task in group:
                    move = partial(transfer_file, task.lora, source, target, task.out, **settings)
                    _record_report(task, task.attempt(move))
            else:
                _move_group(group, source, target, chosen, format, dtype, cache, memory, progress)
            cache.save()
    return [task.outcome for task in tasks if task.outcome is not None]


def _move_group(
    group: list[_Task],
    source: Base,
    target: Base,
    chosen: Options,
    format: str,
    dtype: Any,
    cache: BasisCache,
    memory: Memory,
    progress: Progress | None,
) -> None:
    """The stages of a transfer, for several LoRAs together."""
    inputs = [*source.files, *target.files]
    output = OutputForm.of(chosen, format, dtype)

    def start(task: _Task) -> None:
        check_output(task.out, [task.lora, *inputs])
        task.job = prepare_job(task.lora, source, target, chosen, output)

    def decide(task: _Task, job: Job) -> None:
        memory.reserved += job.work.result_bytes()
        decide_method(job, source, target, cache, memory)

    def tell(done: int, what: str) -> None:
        if progress:
            progress(done, len(group), what)

    memory.reserved = 0
    for i, task in enumerate(group):
        tell(i, f"reading {task.lora.name}")
        task.attempt(partial(start, task))
    for task in group:
        if task.job is not None:
            task.attempt(partial(decide, task, task.job))
    jobs = [task.job for task in group if task.job is not None]
    memory.reserved = sum(job.work.result_bytes() for job in jobs)
    memory.begin()
    started = time.perf_counter()
    move_all([job.work for job in jobs], source, target, cache, memory, progress)
    share = (time.perf_counter() - started) / max(1, len(jobs))

    def end(task: _Task, job: Job) -> Report:
        task.seconds += share
        done = finish_job(job, source, target, cache, task.notes)
        begun = time.perf_counter()
        done.save(task.out, format=format, dtype=dtype)
        done.report.seconds["write"] = time.perf_counter() - begun
        return done.report

    for i, task in enumerate(group):
        if task.job is not None:
            tell(i, f"writing {task.lora.name}")
            report = task.attempt(partial(end, task, task.job))
            task.job = None  # its factors are on the disk now
            _record_report(task, report)
    tell(len(group), "")


def _record_report(task: _Task, report: Report | None) -> None:
    if report is not None:
        task.outcome = Outcome(task.lora, task.out, report=report, seconds=task.seconds)


def _group_tasks(tasks: list[_Task], memory: Memory) -> Iterator[list[_Task]]:
    """The LoRAs in groups that fit into memory, at least one each."""
    group: list[_Task] = []
    size = 0
    for task in tasks:
        more = _estimate_size(task.lora)
        if group and size + more > memory.for_loras:
            yield group
            group, size = [], 0
        group.append(task)
        size += more
    if group:
        yield group


def _estimate_size(lora: Path) -> int:
    """About how much memory a LoRA takes on its way; 0 for what cannot be read anyway."""
    try:
        headers = open_adapter(lora).headers.values()
    except ProLoRAError:
        return 0
    numbers = 0
    for header in headers:
        count = 1
        for length in header.shape:
            count *= length
        numbers += count
    return BYTES_A_NUMBER * numbers


@contextmanager
def _open_cache(options: Options, groups: int) -> Iterator[BasisCache]:
    """The cache asked for; without one, what is needed again goes to a temporary folder."""
    if options.cache is None and groups > 1 and weights_needed(options) == "bases":
        with tempfile.TemporaryDirectory(prefix="prolora-") as temporary:
            yield BasisCache(temporary)
        return
    with BasisCache(options.cache).saving() as cache:
        yield cache


def _output_name(lora: Path, format: str) -> str:
    """A PEFT adapter is a folder and has no suffix; every other LoRA is a .safetensors file."""
    comes_as_peft = (lora / PEFT_CONFIG).is_file()
    if format == "peft" or (format == "auto" and comes_as_peft):
        return lora.name if lora.is_dir() else lora.stem
    return f"{lora.name}.safetensors" if lora.is_dir() else lora.name


def _label_progress(
    group: list[_Task], inputs: list[Path], progress: Progress | None
) -> Progress | None:
    """The caller's callback, told which LoRAs are at work."""
    if progress is None:
        return None
    first, last = (inputs.index(task.lora) + 1 for task in (group[0], group[-1]))
    of = f"{first}" if first == last else f"{first}–{last}"
    label = f"LoRA {of} of {len(inputs)}"
    return lambda done, total, name: progress(done, total, f"{label}: {name}")
