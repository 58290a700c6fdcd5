"""Moving LoRAs between one pair of bases: what is learnt of the bases serves all of them."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.lora import Lora
from ..bases import Base
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.memory import Memory
from ..errors import ProLoRAError, explain_os_error
from ..reports.lora_report import LoraReport
from ..reports.outcome import Outcome
from .base_pair import BasePair
from .decision import label_stage
from .ledger import BYTES_A_NUMBER, LORA_FAILURES, Ledger
from .options import TransferOptions
from .output_paths import check_output
from .result import save_result
from .resume import Recipe, read_verdict


@dataclass
class Task:
    """One LoRA of several, on its way to an outcome."""

    lora: Path
    out: Path
    recipe: Recipe | None = None
    ledger: Ledger | None = None
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
            self.ledger = None
            self.outcome = Outcome(self.lora, self.out, error=as_refusal(error))
            return None
        finally:
            self.seconds += time.perf_counter() - started
            if self.outcome:
                self.outcome = replace(self.outcome, seconds=self.seconds)

    def is_made(self, recipe: Recipe) -> bool:
        """Returns whether the result exists already, and takes it as the outcome."""
        self.recipe = recipe
        if recipe.options.overwrite or not recipe.is_made(self.out):
            return False
        verdict = read_verdict(self.out)
        self.outcome = Outcome(
            self.lora, self.out, None, None, True, *verdict, behind=recipe.list_unread()
        )
        return True

    def finish(self, report: LoraReport | None) -> None:
        """Notes the report as the outcome, if there is one."""
        if report is not None:
            self.outcome = Outcome(self.lora, self.out, report=report, seconds=self.seconds)


def as_refusal(error: BaseException) -> ProLoRAError:
    """Turns an error of the system or of torch into one of prolora's."""
    if isinstance(error, ProLoRAError):
        return error
    said = explain_os_error(error) if isinstance(error, OSError) else str(error)
    refusal = ProLoRAError(said or type(error).__name__)
    refusal.__cause__ = error
    return refusal


@dataclass(frozen=True)
class PairMover:
    """LoRAs between the same two bases.

    They are taken a few at a time, as many as memory allows. What a later group needs of the
    weights is in the basis cache by then.
    """

    # The bases, with blocks matched; it shows no progress, since each group labels its own
    pair: BasePair
    asked: TransferOptions  # the options as they were given

    @classmethod
    def open(
        cls, source: Base, target: Base, asked: TransferOptions, cache: BasisCache
    ) -> PairMover:
        """Matches the blocks of the bases once, for all LoRAs."""
        match = BasePair(source, target, asked, cache).match_blocks()
        pair = BasePair(source, target, replace(asked, match=match, progress=None), cache)
        return cls(pair, asked)

    def _look_up(self, task: Task) -> None:
        task.is_made(task.recipe or self.make_recipe(task))

    def make_recipe(self, task: Task) -> Recipe:
        """Reads what determines the result: the whole LoRA, for its hash.

        Raises:
            UnsupportedFormat: the LoRA cannot be read.
        """
        return Recipe.of(task.lora, self.pair.source, self.pair.target, self.asked)

    def run(
        self, tasks: Sequence[Task], cache: BasisCache, loras: Sequence[Path]
    ) -> Iterator[Task]:
        """Does the tasks in groups that fit into memory; yields finished ones.

        Tasks with an existing result come first. `loras` are all LoRAs of the caller, for progress;
        none of them is overwritten.
        """
        for task in tasks:
            task.attempt(partial(self._look_up, task))
        yield from [task for task in tasks if task.outcome]
        left = [task for task in tasks if task.outcome is None]
        groups = list(_group_tasks(left, self.pair.memory))
        with _keep_bases(cache, self.asked, len(groups)) as kept:
            pair = replace(self.pair, cache=kept)
            for group in groups:
                progress = _label_progress(group, loras, self.asked.progress)
                inputs = self._list_inputs(loras)
                yield from self._move_group(pair, group, inputs, progress)
                kept.save()

    def _list_inputs(self, loras: Iterable[Path]) -> list[Path]:
        """Lists what no output may overwrite: existing LoRAs, and the bases."""
        # A path that cannot be looked at is no file that could be overwritten.
        there = [lora for lora in loras if os.path.exists(lora)]
        return [*there, *self.pair.source.files, *self.pair.target.files]

    def _move_group(
        self, pair: BasePair, group: list[Task], inputs: list[Path], progress: Progress | None
    ) -> Iterator[Task]:
        """Runs the stages of a transfer by weights for several LoRAs together."""

        def show(done: int, what: str) -> None:
            if progress:
                progress(done, len(group), what)

        for i, task in enumerate(group):
            show(i, f"reading {task.lora.name}")
            task.ledger = task.attempt(partial(self._plan, pair, task, inputs))
        planned = [task for task in group if task.ledger is not None]
        started = time.perf_counter()
        ledgers = pair.move([task.ledger for task in planned if task.ledger], progress)
        share = (time.perf_counter() - started) / max(1, len(planned))
        for task, ledger in zip(planned, ledgers, strict=True):
            task.ledger = ledger
            task.seconds += share
        del ledgers
        for i, task in enumerate(group):
            if task.ledger is not None:
                show(i, f"writing {task.lora.name}")
                report = task.attempt(partial(self._finish, pair, task, task.ledger))
                task.ledger = None  # its factors are on the disk now
                task.finish(report)
            yield task
        show(len(group), "")

    def _plan(self, pair: BasePair, task: Task, inputs: list[Path]) -> Ledger:
        check_output(task.out, inputs, self.asked.overwrite, self.asked.format)
        # What was hashed is what is read: an open LoRA refuses a file that was changed since.
        with task.recipe.lora if task.recipe else Lora.open(task.lora) as lora:
            return pair.plan(lora)

    def _finish(self, pair: BasePair, task: Task, ledger: Ledger) -> LoraReport:
        done = pair.finish(ledger, task.recipe.describe if task.recipe else None)
        return save_result(done, task.out, self.asked.overwrite).report


def _estimate_bytes(lora: Path) -> int:
    """Estimates a LoRA's memory on its way; 0 for unreadable ones."""
    try:
        with Lora.open(lora) as opened:
            return BYTES_A_NUMBER * sum(math.prod(x.shape) for x in opened.headers.values())
    except LORA_FAILURES:
        return 0


def _group_tasks(tasks: Sequence[Task], memory: Memory) -> Iterator[list[Task]]:
    """Groups the LoRAs so that each group fits into memory."""
    group: list[Task] = []
    size = 0
    for task in tasks:
        more = _estimate_bytes(task.lora)
        if group and size + more > memory.lora_bytes:
            yield group
            group, size = [], 0
        group.append(task)
        size += more
    if group:
        yield group


@contextmanager
def _keep_bases(cache: BasisCache, options: TransferOptions, groups: int) -> Iterator[BasisCache]:
    """Yields the cache, or a temporary one if bases are needed again."""
    if cache.folder is None and groups > 1 and options.chosen.needs_bases:
        with tempfile.TemporaryDirectory(prefix="prolora-") as temporary:
            yield BasisCache(temporary)
    else:
        yield cache


def _label_progress(
    group: list[Task], loras: Sequence[Path], progress: Progress | None
) -> Progress | None:
    """Labels the caller's callback with the LoRAs at work."""
    first, last = (loras.index(task.lora) + 1 for task in (group[0], group[-1]))
    of = f"{first}" if first == last else f"{first}–{last}"
    return label_stage(f"LoRA {of} of {len(loras)}:", progress)
