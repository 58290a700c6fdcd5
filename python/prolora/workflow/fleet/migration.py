"""Doing what a plan says: what is done stays, the rest is done, one bad LoRA stops nothing."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ...errors import OutputError
from ...files.managed_folder import ManagedFolder
from ...files.ownership import is_own
from ..options import settle_options, takes_options
from .claims import Claims
from .engines.engine import Engine
from .engines.local import LocalEngine
from .engines.ray_engine import RayEngine
from .outcomes import Outcomes, write_failures
from .plan import Batch, Entry, Plan, select_shard
from .records import Journal, Record, find_time
from .result_folder import PLANS, make_result_folder
from .run_options import DEFAULT_MIGRATION, MigrationChanges, MigrationOptions
from .summary import Summary, summarise
from .worker import RunSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Seconds between two looks at what another process is doing.
_POLL_SECONDS = 1.0

log = logging.getLogger(__name__)


@takes_options
def migrate(
    plan: Plan | str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: MigrationOptions = DEFAULT_MIGRATION,
    **changes: Unpack[MigrationChanges],
) -> Summary:
    """Moves the LoRAs of a plan into a folder; what is there already is not done again.

    Results lie in `out`/loras/TARGET/ under names that follow from the LoRA, the bases, the options
    and the version. A LoRA that fails is a line in `out`/failed.jsonl and stops no other. Several
    processes may work on one folder at the same time: no LoRA is moved twice where the file system
    has locks. At the end summary.json and summary.html are written there.

    Args:
        plan: a plan, or the file of one.
        out: the folder; it is made if it does not exist.
        options: who does it, and with what.
        **changes: options by name, in place of those.

    Returns:
        What became of the whole plan so far, other shards included.

    Raises:
        OutputError: the folder cannot be written, or its disk is full; what is done is kept.
        InvalidOption: an option has a value that it does not take.
        UnsupportedFormat: the plan cannot be read.
    """
    how = settle_options(options, changes, here=False)
    if not isinstance(plan, Plan):
        plan = Plan.read(plan)
    with closing(_start_engine(how)) as engine:
        # Refuses before anything is made.
        plan.make_options(device=how.device, max_memory=how.max_memory)
        batches = select_shard(plan.list_batches(), how.shard)
        folder = make_result_folder(out)
        _keep_plan(plan, folder)
        with _Run(plan, folder, batches, how) as run:
            settings = RunSettings(
                replace(plan, entries=(), notes={}),
                str(folder.path),
                str(run.journal.path),
                how.time_limit,
                None if how.cache is None else os.path.abspath(how.cache),
                how.device,
                how.max_memory,
            )
            run.work(engine, settings)
    summary = summarise(plan, folder.path)
    summary.save(folder.path)
    return summary


def _start_engine(how: MigrationOptions) -> Engine:
    """The engine that the options name, or that was given.

    Raises:
        ProLoRAError: it is not installed, does not start, or its cluster cannot be reached.
    """
    if not isinstance(how.engine, str):
        return how.engine
    if how.engine == "local":
        return LocalEngine()
    return RayEngine(how.address, how.workers, how.gpus_per_worker, how.retries)


def _keep_plan(plan: Plan, folder: ManagedFolder) -> None:
    """Puts a copy of the plan into the folder, by which `status` knows what is left."""
    folder.make_folder(PLANS)
    copy = folder.find_place(PLANS, f"{plan.digest}.jsonl")
    if not (copy.is_file() and is_own(copy, "plan")):
        plan.save(copy, overwrite=True)


@dataclass
class _Run:
    """One call of `migrate`.

    Attributes:
        plan: what is done.
        folder: of the results.
        batches: of this shard.
        how: it is done.
    """

    plan: Plan
    folder: ManagedFolder
    batches: list[Batch]
    how: MigrationOptions
    finished: set[str] = field(default_factory=set)
    tries: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> _Run:
        """Reads what was done before, and begins a journal."""
        self.outcomes = Outcomes(self.folder.path)
        if self.how.retry_failed:
            self.outcomes.failed.clear()
        self.keys = {
            self.plan.key(entry): number
            for number, entry in enumerate(self.plan.entries)
            if not entry.refused
        }
        self.total = sum(len(batch.entries) for batch in self.batches)
        self.journal = Journal(self.folder, {"plan": self.plan.digest})
        self.claims = Claims(self.folder.find_place(PLANS, f"{self.plan.digest}.claims"))
        self.others, self.quiet_since = self._look_at_others(), time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Writes the list of failures, and ends the journal."""
        self.claims.close()
        # Beside another error, as that of a full disk, this one says nothing new.
        with suppress(OutputError) if error else nullcontext():
            try:
                write_failures(self.folder, self.plan)
            finally:
                self.journal.close()

    def work(self, engine: Engine, settings: RunSettings) -> None:
        """Goes over the batches until nothing is left, neither here nor with another process.

        Raises:
            OutputError: nothing can be written any more.
        """
        left = True
        while left:
            self.busy, self.again, before = False, False, len(self.finished)
            with closing(engine.run(self._take_batches(), settings)) as records:
                for record in records:
                    if record is None:
                        self.journal.touch()
                    else:
                        self._note(record)
            left = self.busy or self.again
            if left and len(self.finished) == before:
                time.sleep(_POLL_SECONDS)
                self._watch_others(settings.time_limit)

    def _watch_others(self, time_limit: float) -> None:
        """Takes over what other processes have claimed when none of them gets on any more.

        How long that is, is told by this process's clock alone.
        """
        others = self._look_at_others()
        if others != self.others:
            self.others, self.quiet_since = others, time.monotonic()
        elif self.busy and time.monotonic() - self.quiet_since > time_limit:
            log.warning(
                "another process has not got on for %.0f s: its LoRAs are taken over", time_limit
            )
            self.claims.take_over()
            self.quiet_since = time.monotonic()

    def _look_at_others(self) -> dict[Path, int]:
        """When the other processes' journals were written to last, or touched."""
        files = self.outcomes.reader.list_files()
        return {path: find_time(path) for path in files if path != self.journal.path}

    def _take_batches(self) -> Iterator[Batch]:
        """What is left of each batch, claimed for this process."""
        for batch in self.batches:
            open_entries = self._list_open(batch.entries)
            if not open_entries:
                continue
            claimed = [entry for entry in open_entries if self._claim(entry)]
            if len(claimed) < len(open_entries):
                self.busy = True
            # Another process may have done it before its claim ended.
            self.outcomes.read_new()
            left = self._list_open(claimed)
            for entry in claimed:
                if entry not in left:
                    self.claims.release(self.keys[self.plan.key(entry)])
            if left:
                yield Batch(batch.pair, tuple(left))

    def _list_open(self, entries: Iterable[Entry]) -> list[Entry]:
        """The entries that are still to be done."""
        left = []
        for entry in entries:
            key = self.plan.key(entry)
            if key in self.finished:
                continue
            if self.outcomes.is_settled(key, entry):
                self._finish(key, Path(entry.lora).name)
            else:
                left.append(entry)
        return left

    def _claim(self, entry: Entry) -> bool:
        return self.claims.claim(self.keys[self.plan.key(entry)])

    def _note(self, record: Record) -> None:
        """Writes a record down; a failure of the system may be tried again first.

        Raises:
            OutputError: nothing can be written any more.
        """
        if record.status == "stopped":
            raise OutputError(record.reason)
        tries = self.tries.get(record.key, 0)
        if record.status == "failed" and record.transient and tries < self.how.retries:
            self.tries[record.key] = tries + 1
            self.again = True
        else:
            self.journal.add(record.after(self.journal.seconds))
            self._finish(record.key, Path(record.lora).name)
        self.claims.release(self.keys[record.key])

    def _finish(self, key: str, name: str) -> None:
        if key not in self.finished:
            self.finished.add(key)
            if self.how.progress:
                self.how.progress(len(self.finished), self.total, name)
