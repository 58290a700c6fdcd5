"""A plan: which LoRA moves from which base to which, how, and at what price; one JSON line each."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...bases.memory import STACK_BYTES
from ...errors import InvalidOption, UnsupportedFormat, input_error
from ...files.hashing import hash_text
from ...files.jsontext import parse_json_object
from ...files.ownership import WRITTEN_BY, make_mark
from ...files.writing import write_text_atomically
from ...version import __version__
from ..options import DEFAULT_OPTIONS, TransferOptions, settle_options
from ..output_paths import check_beside

FORMAT = 1
"""The version of the file format."""

BATCH_LORAS, BATCH_BYTES = 32, 4 << 30
"""The most LoRAs of a batch, and the most memory that they take together."""

PROCESS_BYTES = 250 << 20
"""What a process takes that has imported torch and prolora (measured on Linux)."""

_KEY = "prolora_plan"


@dataclass(frozen=True, slots=True)
class PlannedBase:
    """A base of a plan.

    Attributes:
        path: a file, a folder or an id on the hub, as `open_experts` takes it.
        fingerprint: which files it was (`bases.identity.compute_fingerprint`), by expert; the key
            is "" for a base without experts.
        family: its family or layout; "" if that is not known.
        bytes: size of its files.
    """

    path: str
    fingerprint: dict[str, str] = field(default_factory=dict)
    family: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class PairOfBases:
    """Two bases of a plan, by their labels.

    Attributes:
        source: the label of the base that LoRAs were trained on.
        target: the label of the base that they move to.
        expert: "high_noise" or "low_noise", of models of two experts; "" for others.
    """

    source: str
    target: str
    expert: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One LoRA and one target.

    Attributes:
        lora: absolute path of a file or of an adapter's folder.
        pair: the bases; the source is "" where none was recognised.
        appended: put at the end of the result's name: the expert, where a LoRA moves to both.
        size: bytes of the LoRA's file.
        modified: when its content last changed, in nanoseconds since 1970.
        seconds: estimated time to move it.
        memory: estimated bytes in memory while it moves.
        refused: why it cannot move; "" if it can.
    """

    lora: str
    pair: PairOfBases
    appended: str = ""
    size: int = 0
    modified: int = 0
    seconds: float = 0.0
    memory: int = 0
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As a line of the plan; fields that say nothing are left out."""
        line = {"lora": self.lora, **asdict(self.pair)}
        rest = asdict(self)
        return {k: v for k, v in (line | rest).items() if k != "pair" and v not in ("", 0)}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Entry:
        """Reads what `to_dict` wrote.

        Raises:
            TypeError, KeyError: it is no such line.
        """
        names = [f.name for f in fields(PairOfBases)]
        pair = PairOfBases(**{name: str(line.get(name, "")) for name in names})
        rest = {key: value for key, value in line.items() if key not in names}
        return cls(**rest, pair=pair)


@dataclass(frozen=True, slots=True)
class Batch:
    """LoRAs that move together between the same two bases.

    Attributes:
        pair: the bases.
        entries: the LoRAs; none is refused.
    """

    pair: PairOfBases
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Plan:
    """What `prolora.migrate` does; save it, read it, filter its lines.

    Attributes:
        entries: one for each LoRA and target; those of one pair of bases follow each other.
        bases: label -> base.
        options: of `transfer`, with `format` and `dtype`, by name; those that do not change a
            result (cache, device, max_memory) are given to `migrate`.
        notes: how it was made: seconds, rates of the machine that the estimates come from.
    """

    entries: Sequence[Entry]
    bases: Mapping[str, PlannedBase]
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: how many LoRAs move, and how many are refused."""
        refused = sum(bool(entry.refused) for entry in self.entries)
        pairs = len({entry.pair for entry in self.entries if not entry.refused})
        moves = len(self.entries) - refused
        return f"Plan({moves} moves between {pairs} pairs of bases, {refused} refused)"

    @cached_property
    def digest(self) -> str:
        """Sixteen digits that tell this plan from others; notes and estimates do not count."""
        lines = [replace(entry, seconds=0.0, memory=0).to_dict() for entry in self.entries]
        bases = {label: asdict(base) for label, base in self.bases.items()}
        return hash_text(json.dumps([bases, dict(self.options), lines], sort_keys=True))[:16]

    def key(self, entry: Entry) -> str:
        """What tells a move from all others: the LoRA's file, the bases, the options, the version.

        A LoRA that was changed, a base that was exchanged and another option give another key.
        """
        prints = [self.find_fingerprint(entry.pair, which) for which in ("source", "target")]
        lora = [entry.lora, entry.size, entry.modified, entry.appended]
        parts = [lora, prints, dict(self.options), __version__]
        return hash_text(json.dumps(parts, sort_keys=True))[:20]

    def find_fingerprint(self, pair: PairOfBases, which: str) -> str:
        """The fingerprint of a base of a pair.

        Args:
            pair: the bases.
            which: "source" or "target".
        """
        base = self.bases.get(getattr(pair, which))
        if base is None:
            return ""
        return base.fingerprint.get(pair.expert) or next(iter(base.fingerprint.values()), "")

    def make_options(self, **resources: Any) -> TransferOptions:
        """The options as a transfer takes them.

        Args:
            **resources: cache, device and max_memory.

        Raises:
            InvalidOption: an option of the plan that this version does not take.
        """
        return settle_options(DEFAULT_OPTIONS, {**self.options, **resources}).for_file()

    def list_batches(self) -> list[Batch]:
        """The moves in batches, the same for every reader of the plan."""
        batches: list[Batch] = []
        members: list[Entry] = []
        for entry in self.entries:
            if entry.refused:
                continue
            memory = sum(member.memory for member in members) + entry.memory
            if members and (
                entry.pair != members[0].pair or len(members) == BATCH_LORAS or memory > BATCH_BYTES
            ):
                batches.append(Batch(members[0].pair, tuple(members)))
                members = []
            members.append(entry)
        if members:
            batches.append(Batch(members[0].pair, tuple(members)))
        return batches

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the plan: a line about itself, then a line for each entry.

        Args:
            path: the file; a plan that nobody has edited is replaced.
            overwrite: replace whatever is there.

        Raises:
            ForeignFile: a file is there that prolora did not write.
            OutputError: the file cannot be written.
        """
        check_beside(path, "plan", overwrite=overwrite)
        write_text_atomically(path, "".join(self._write_lines()))

    def _write_lines(self) -> Iterator[str]:
        head = {
            _KEY: FORMAT,
            WRITTEN_BY: make_mark("plan"),
            "version": __version__,
            "options": dict(self.options),
            "bases": {label: asdict(base) for label, base in self.bases.items()},
            "notes": dict(self.notes),
        }
        for line in (head, *(entry.to_dict() for entry in self.entries)):
            yield json.dumps(line) + "\n"

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan that `save` wrote; lines may have been taken out.

        Raises:
            UnsupportedFormat: it cannot be read, or is no plan.
        """
        try:
            with open(path, encoding="utf-8") as file:
                return _parse(file, os.fspath(path))
        except (OSError, UnicodeDecodeError) as error:
            raise input_error(path, error) from error


def _parse(lines: Iterable[str], where: str) -> Plan:
    """The plan in the lines of a file.

    Raises:
        UnsupportedFormat: it is none, or a line is damaged.
    """
    reader = iter(lines)
    try:
        head = parse_json_object(next(reader, ""), where)
    except UnsupportedFormat:
        head = {}
    if head.get(_KEY) != FORMAT:
        raise UnsupportedFormat(
            f"{where}: is no plan of this version; make one with `prolora plan`"
        )
    entries = []
    try:
        bases = {label: PlannedBase(**base) for label, base in head["bases"].items()}
        options, notes = dict(head["options"]), dict(head["notes"])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UnsupportedFormat(f"{where}: line 1 is damaged: {error!r}") from error
    for number, line in enumerate(reader, 2):
        if not line.strip():
            continue
        fields_of_line = parse_json_object(line, f"{where}, line {number}")
        try:
            entry = Entry.from_dict(fields_of_line)
            if not entry.refused and not {entry.pair.source, entry.pair.target} <= bases.keys():
                raise KeyError("a base that line 1 does not list")
        except (TypeError, KeyError) as error:
            raise UnsupportedFormat(f"{where}, line {number}: is damaged: {error}") from error
        entries.append(entry)
    return Plan(entries, bases, options, notes)


def estimate_worker_memory(entries: Iterable[Entry]) -> int:
    """Estimated bytes of a process that moves LoRAs: itself, weights, and the LoRAs of a batch.

    Args:
        entries: of one pair of bases.
    """
    largest = max((entry.memory for entry in entries), default=0)
    together = max(largest, min(BATCH_LORAS * largest, BATCH_BYTES))
    return PROCESS_BYTES + 2 * STACK_BYTES + together


def select_shard(batches: Sequence[Batch], shard: tuple[int, int] | None) -> list[Batch]:
    """The batches of one shard: neighbours in the plan, of about the same time in every shard.

    Args:
        batches: of the whole plan.
        shard: (number from 1 on, how many); None takes all.

    Raises:
        InvalidOption: there is no such shard.
    """
    if shard is None:
        return list(batches)
    try:
        number, count = map(operator.index, shard)
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"shard must be (number, count), as (2, 8), not {shard!r}") from error
    if not 1 <= number <= count:
        raise InvalidOption(
            f"shard {number}/{count}: the first is 1/{count}, the last {count}/{count}"
        )
    costs = [sum(entry.seconds or 1.0 for entry in batch.entries) for batch in batches]
    total, before, chosen = sum(costs), 0.0, []
    for batch, cost in zip(batches, costs, strict=True):
        # A batch belongs where its middle lies.
        if min(count - 1, int((before + cost / 2) / total * count)) == number - 1:
            chosen.append(batch)
        before += cost
    return chosen


def parse_shard(text: str) -> tuple[int, int]:
    """Reads "2/8".

    Raises:
        InvalidOption: it is no such text.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InvalidOption(f"a shard is a number and a count, as 2/8, not {text!r}")
    return int(number), int(count)


def make_label(name: str, taken: Iterable[str]) -> str:
    """A label for a base that a folder may have as its name.

    Args:
        name: of the base.
        taken: labels of other bases.
    """
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name or "base")
    plain = plain.strip(".-") or "base"
    lower = {label.casefold() for label in taken}
    label, number = plain, 2
    while label.casefold() in lower:
        label, number = f"{plain}-{number}", number + 1
    return label
