"""How far a migration is, from its folder alone, while other processes write to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UnsupportedFormat
from ...files.managed_folder import is_component
from .outcomes import Reason, find_damaged
from .plan import Plan
from .records import JournalReader, Record, is_at_work
from .result_folder import PLANS
from .summary import summarise

# Records of a process that its rate is taken from.
_WINDOW = 64


@dataclass(frozen=True)
class Status:
    """How far a migration is.

    Attributes:
        total: moves of the plan.
        done: those whose result is there, with the size that it had.
        failed: those that failed.
        refused: those that the plan refuses.
        left: those that are still to be done.
        reasons: why moves failed or were refused -> how many, and their LoRAs.
        at_work: number of processes that work on the folder now.
        rate: moves a second of all of them; None where none works, or they have just begun.
        seconds_left: until all is done at that rate; None where that is not known.
        plan: digest of the plan.
        damaged: result -> what is wrong with it, of those that are done; None where nobody looked.
    """

    total: int
    done: int
    failed: int
    refused: int
    left: int
    reasons: dict[str, Reason] = field(default_factory=dict)
    at_work: int = 0
    rate: float | None = None
    seconds_left: float | None = None
    plan: str = ""
    damaged: dict[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def read_status(folder: str | os.PathLike[str], *, verify: bool = False) -> Status:
    """How far the migration into a folder is; nothing is written and no lock is waited for.

    Args:
        folder: what `migrate` was given as `out`. Of several plans that were run into it, the one
            counts that a process wrote to last.
        verify: read every result that is done, and compare its bytes with those that were written.

    Raises:
        UnsupportedFormat: no plan was run into that folder.
    """
    place = Path(folder)
    reader = JournalReader(place)
    windows: dict[Path, list[Record]] = {}
    for path, record in reader.read_new():
        window = windows.setdefault(path, [])
        window.append(record)
        del window[:-_WINDOW]
    working = [path for path in reader.list_files() if is_at_work(path)]
    plan = Plan.read(_find_plan(place, reader, working))
    found = summarise(plan, place)
    rate = sum(measure_rate(windows.get(path, [])) for path in working) or None
    return Status(
        **{state: found.count(state) for state in ("total", "done", "failed", "refused", "left")},
        reasons=found.reasons,
        at_work=len(working),
        rate=rate,
        seconds_left=found.count("left") / rate if rate else None,
        plan=plan.digest,
        damaged=find_damaged(plan, place) if verify else None,
    )


def _find_plan(folder: Path, reader: JournalReader, working: Sequence[Path]) -> Path:
    """The copy of the plan that is at work, or else was last.

    Raises:
        UnsupportedFormat: there is none.
    """
    for journal in reversed(working or reader.list_files()):
        name = f"{reader.find_head(journal).get('plan')}.jsonl"
        plan = folder / PLANS / name
        if is_component(name) and plan.is_file():
            return plan
    raise UnsupportedFormat(
        f"{folder}: no migration was run into this folder; name the folder that `migrate()` "
        "was given as -o"
    )


def measure_rate(records: Sequence[Record]) -> float:
    """Moves a second of one process, by its own clock; 0 where that cannot be told yet.

    Args:
        records: its last ones, in order.
    """
    made = [record for record in records if not record.kept]
    if len(made) < 2 or made[-1].at <= made[0].at:
        return 0.0
    return (len(made) - 1) / (made[-1].at - made[0].at)
