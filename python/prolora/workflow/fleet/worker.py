"""Moving LoRAs between one pair of bases of a plan: the same code wherever it runs."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...bases import Base
from ...bases.cache.basis_cache import BasisCache
from ...bases.experts import open_experts
from ...bases.identity import compute_fingerprint
from ...core.precision import full_precision
from ...errors import OutputError, ProLoRAError, UnrelatedBases
from ...files.managed_folder import ManagedFolder
from ..by_weights.ledger import LORA_FAILURES
from ..outcome import Outcome
from ..output_paths import name_output
from ..pair_mover import PairMover, Task, as_refusal
from ..report import Report
from ..resume import Recipe
from .outcomes import measure_result
from .plan import Entry, PairOfBases, Plan
from .records import Record
from .result_folder import MARKER, RESULTS

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class RunSettings:
    """What a worker needs to know; it can be pickled.

    Attributes:
        plan: without its entries: it gives bases, options and keys.
        folder: of the results; every worker reaches it by this path.
        mark: a file that this run has just made in it: who does not see it has another folder.
        time_limit: seconds without any progress after which a LoRA is given up.
        cache: folder of subspaces; None keeps them as long as the worker lives.
        device: where to compute.
        max_memory: bytes that a worker's process may take.
    """

    plan: Plan
    folder: str
    mark: str
    time_limit: float
    cache: str | None = None
    device: str | None = None
    max_memory: int | str | None = None


class PairWorker:
    """One pair of bases, opened, with all that is learnt of them.

    Bases are opened by the first call that needs them. A pair that cannot be opened fails every
    entry, and the next call tries again.
    """

    def __init__(
        self, pair: PairOfBases, settings: RunSettings, beat: Callable[[], object] = lambda: None
    ) -> None:
        """Opens nothing yet.

        Args:
            pair: the bases.
            settings: of the run.
            beat: called whenever a step is done; what it raises ends the work.

        Raises:
            InvalidOption: an option of the plan that this version does not take.
        """
        self.pair, self.settings, self.plan = pair, settings, settings.plan
        self.options = self.plan.make_options(
            cache=settings.cache,
            device=settings.device,
            max_memory=settings.max_memory,
            progress=lambda *_: beat(),
        )
        self._beat = beat
        self._place = ManagedFolder(Path(settings.folder), MARKER)
        self._stack = ExitStack()
        self._mover: PairMover | None = None
        self._cache = BasisCache(None)

    def move_each(self, entries: Sequence[Entry]) -> Iterator[Record]:
        """Moves LoRAs between the bases and gives a record for each, in any order.

        After a record "stopped" nothing more can be written, and none follows.
        """
        with full_precision():
            try:
                mover = self.open()
            except LORA_FAILURES as error:
                refusal = as_refusal(error)
                yield from (
                    replace(Record.of_failure(self.plan.key(entry), entry, refusal), transient=True)
                    for entry in entries
                )
                return
            yield from self._move_all(mover, entries)

    def _move_all(self, mover: PairMover, entries: Sequence[Entry]) -> Iterator[Record]:
        """The records of `move_each`, once the bases are open."""
        tasks: dict[Path, Task] = {}
        waiting: dict[Path, list[Entry]] = {}
        for entry in entries:
            self._beat()
            task = Task(Path(entry.lora), Path(entry.lora))
            recipe = task.recipe = task.attempt(partial(mover.make_recipe, task))
            out = task.attempt(partial(self._name_result, entry, recipe))
            if out is None:
                yield self._record(entry, task)
                continue
            task.out = out
            # Equal LoRAs of one name have one result, which is made once.
            waiting.setdefault(task.out, []).append(entry)
            tasks.setdefault(task.out, task)
        ordered = list(tasks.values())
        for task in mover.run(ordered, self._cache, [task.lora for task in ordered]):
            for record in self._record_all(waiting[task.out], task):
                yield record
                if record.status == "stopped":
                    return

    def open(self) -> PairMover:
        """The bases, opened at the first call and compared with those of the plan.

        Raises:
            ProLoRAError: they cannot be opened, or are other files than those of the plan.
            OutputError: the folder of the results cannot be made.
        """
        if self._mover is not None:
            return self._mover
        self.close()  # what an earlier call opened before it failed
        self._cache = self._stack.enter_context(BasisCache(self._find_cache()).saving())
        source, target = (self._open_base(which) for which in ("source", "target"))
        mover = PairMover.open(source, target, self.options, self._cache)
        self._place.make_folder(RESULTS, self.pair.target)
        self._mover = mover
        return mover

    def _find_cache(self) -> str:
        """The folder asked for, or one for the life of this worker."""
        if self.settings.cache is not None:
            return self.settings.cache
        temporary = tempfile.TemporaryDirectory(prefix="prolora-")
        return self._stack.enter_context(temporary)

    def _open_base(self, which: str) -> Base:
        planned = self.plan.bases[getattr(self.pair, which)]
        experts = open_experts(planned.path)
        base = experts.get(self.pair.expert) or next(iter(experts.values()))
        expected = self.plan.find_fingerprint(self.pair, which)
        if expected and compute_fingerprint(base, self._cache) != expected:
            raise ProLoRAError(
                f"{planned.path}: is not the {which} base that the plan was made for: its files "
                "differ. Put those files there, or make the plan again"
            )
        return base

    def _name_result(self, entry: Entry, recipe: Recipe) -> Path:
        """Where a result goes: its name follows from all that it is made of.

        Raises:
            OutputError: a link has its name.
        """
        appended = f"{entry.appended}-{recipe.digest(self._cache)}"
        name = name_output(Path(entry.lora), str(self.options.format), appended)
        return self._place.find_place(RESULTS, self.pair.target, name)

    def _record_all(self, entries: Sequence[Entry], task: Task) -> Iterator[Record]:
        for number, entry in enumerate(entries):
            record = self._record(entry, task)
            yield record if number == 0 else replace(record, kept=True, seconds=0.0)

    def _record(self, entry: Entry, task: Task) -> Record:
        """The record of a task that has its outcome."""
        outcome, key = task.outcome, self.plan.key(entry)
        if outcome is None or outcome.error is not None:
            error = outcome.error if outcome else ProLoRAError("it was not reached")
            assert error is not None
            record = Record.of_failure(key, entry, error)
            verdict = "no-go" if isinstance(error, UnrelatedBases) else ""
            stopped = self._is_stopped_by(error)
            return replace(
                record,
                status="stopped" if stopped else "failed",
                verdict=verdict,
                seconds=round(task.seconds, 3),
            )
        return self._record_success(key, entry, outcome)

    def _record_success(self, key: str, entry: Entry, outcome: Outcome) -> Record:
        folder = Path(self.settings.folder)
        return Record(
            key,
            entry.lora,
            entry.pair.source,
            entry.pair.target,
            "done",
            out=outcome.out.relative_to(folder).as_posix(),
            size=measure_result(outcome.out),
            seconds=round(outcome.seconds, 3),
            kept=outcome.kept,
            unread=len(outcome.unread),
            **(_summarise(outcome.report) if outcome.report else {}),
        )

    def _is_stopped_by(self, error: ProLoRAError) -> bool:
        """Whether an error says that no result can be written, whichever LoRA comes next."""
        cause = error.__cause__
        folder = self._place.path / RESULTS / self.pair.target
        if isinstance(cause, OSError) and cause.errno in _FULL_DISK:
            return True
        return isinstance(error, OutputError) and not os.access(folder, os.W_OK | os.X_OK)

    def close(self) -> None:
        """Closes the bases, and saves what was learnt of them."""
        self._mover = None
        self._stack.close()


def _summarise(report: Report) -> dict[str, Any]:
    """What a record keeps of a report."""
    energy = report.share_on_target
    verdict = "" if report.verdict is None else "go" if report.verdict.related else "weak"
    return {
        "method": report.method,
        "verdict": verdict,
        "coverage": round(report.coverage, 4),
        "energy": None if energy is None else round(energy, 4),
    }
