"""What became of a plan in a folder, from its journals and results alone."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import ProLoRAError, UnsupportedFormat
from ...files.managed_folder import ManagedFolder
from ...files.state import read_state
from ..resume import explain_damage
from .plan import Entry, Plan
from .records import JournalReader, Record
from .result_folder import FAILED

State = Literal["done", "failed", "refused", "left"]


class Outcomes:
    """What the journals of a folder say of each move.

    Journals have no common clock. A success counts whatever else there is, as long as its result is
    there and has the size that it had.

    Attributes:
        reader: of the journals.
        done: key of a move -> its success.
        failed: key of a move -> its last failure.
    """

    def __init__(self, folder: Path) -> None:
        """Reads what is there."""
        self.folder, self.reader = folder, JournalReader(folder)
        self.done: dict[str, Record] = {}
        self.failed: dict[str, Record] = {}
        self.read_new()

    def read_new(self) -> None:
        """Reads what was added since."""
        for _, record in self.reader.read_new():
            if record.status == "failed":
                self.failed[record.key] = record
            elif record.status == "done":
                self.failed.pop(record.key, None)
                earlier = self.done.get(record.key)
                # That a result was there already says less than the record of the move itself.
                if earlier is None or earlier.coverage is None or record.coverage is not None:
                    self.done[record.key] = record

    def is_there(self, key: str) -> bool:
        """Whether the result of a success is where its record says, with the size that it had."""
        record = self.done.get(key)
        size = record.size if record else 0
        return bool(record and size > 0 and measure_result(self.folder / record.out) == size)

    def is_settled(self, key: str, entry: Entry) -> bool:
        """Whether nothing is left to do: the result is there, or the LoRA was refused."""
        if key in self.done:
            return self.is_there(key) and _is_unchanged(entry)
        refusal = self.failed.get(key)
        return refusal is not None and not refusal.transient and _is_unchanged(entry)


def read_outcomes(plan: Plan, folder: Path) -> Iterator[tuple[Entry, State, Record | None]]:
    """What became of each entry of a plan, in its order, and the record that says so.

    Args:
        plan: the plan.
        folder: of the results.
    """
    outcomes = Outcomes(folder)
    for entry in plan.entries:
        key = "" if entry.refused else plan.key(entry)
        if entry.refused:
            yield entry, "refused", None
        elif outcomes.is_there(key):
            yield entry, "done", outcomes.done[key]
        elif key in outcomes.failed:
            yield entry, "failed", outcomes.failed[key]
        else:
            yield entry, "left", None


def measure_result(path: Path) -> int:
    """Bytes of a result, the weights of a folder; 0 where it is not there, or only a link."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            return sum(os.lstat(file).st_size for file in path.glob("*.safetensors"))
        return os.lstat(path).st_size if stat.S_ISREG(mode) else 0
    except OSError:
        return 0


def find_damaged(plan: Plan, folder: Path) -> dict[str, str]:
    """The results of a plan that are not what was written under their names, and why.

    Each is read completely.

    Args:
        plan: the plan.
        folder: of the results.
    """
    done = [
        record.out for _, state, record in read_outcomes(plan, folder) if state == "done" and record
    ]
    reasons = {out: explain_damage(folder / out) for out in done}
    return {out: reason for out, reason in reasons.items() if reason}


@dataclass
class Reason:
    """Why some moves failed or were refused.

    Attributes:
        count: of the moves.
        files: their LoRAs, each once.
    """

    count: int = 0
    files: list[str] = field(default_factory=list)


def gather_reasons(refused: Iterable[tuple[Entry, str]]) -> dict[str, Reason]:
    """Equal reasons together, the most frequent first.

    Args:
        refused: entries, and why each does not move.
    """
    reasons: dict[str, Reason] = {}
    for entry, text in refused:
        # Without the name of the LoRA, so that equal ones count together.
        short = text.removeprefix(f"{entry.lora}: ").replace(entry.lora, Path(entry.lora).name)
        reason = reasons.setdefault(short, Reason())
        reason.count += 1
        reason.files.append(entry.lora)
    for reason in reasons.values():
        reason.files = list(dict.fromkeys(reason.files))
    return dict(sorted(reasons.items(), key=lambda item: -item[1].count))


def write_failures(folder: ManagedFolder, plan: Plan) -> None:
    """Writes failed.jsonl anew: a line for each LoRA that failed or was refused, with the reason.

    Raises:
        OutputError: it cannot be written.
    """
    lines = []
    for entry, state, record in read_outcomes(plan, folder.path):
        if state in ("failed", "refused"):
            line = {"lora": entry.lora, "source": entry.pair.source, "target": entry.pair.target}
            # Of a refusal the plan has the words alone.
            error = record.error if record else ProLoRAError(entry.refused).to_dict()
            lines.append(json.dumps(line | {"error": error}) + "\n")
    if lines or (folder.path / FAILED).exists():
        folder.write_text(FAILED, "".join(lines))


def _is_unchanged(entry: Entry) -> bool:
    """Whether the LoRA's file is as the plan saw it; one that is gone counts as unchanged."""
    size, modified = find_state(Path(entry.lora))
    return (size, modified) in ((entry.size, entry.modified), (0, 0))


def find_state(lora: Path) -> tuple[int, int]:
    """Bytes of a LoRA and when its content last changed; zeros where it cannot be reached.

    Args:
        lora: a file, or the folder of an adapter.
    """
    try:
        files = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
        states = [read_state(file) for file in files]
    except (OSError, UnsupportedFormat):
        return 0, 0
    return sum(s.size for s in states), max((s.modified for s in states), default=0)
