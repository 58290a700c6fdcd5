"""A plan: which LoRA moves from which base to which, how, and at what price; one JSON line each."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from ...bases.memory import STACK_BYTES
from ...comparison.module_map import AUTO_MATCH
from ...errors import InvalidOption, UnsupportedFormat, input_error
from ...files.hashing import hash_text
from ...files.jsontext import parse_json_object
from ...files.managed_folder import is_component
from ...files.outside import is_path_text, open_regular, read_fields
from ...files.ownership import WRITTEN_BY, is_signed, make_mark
from ...files.writing import write_text_atomically
from ...version import __version__
from ..options import BEST, DEFAULT_OPTIONS, TransferOptions, settle_options
from ..output_paths import check_beside

FORMAT = 3
"""The version of the file format."""

BATCH_LORAS, BATCH_BYTES = 32, 4 << 30
"""The most LoRAs of a batch, and the most memory that they take together."""

PROCESS_BYTES = 250 << 20
"""What a process takes that has imported torch and prolora (measured on Linux)."""

_KEY = "prolora_plan"
MOVES_BY_WEIGHTS = "method 'best' may run the models, and a plan moves by weights: take 'auto'"
# Options of a transfer that change no result; those who run a plan choose them.
_NOT_PLANNED = {"cache", "device", "max_memory", "overwrite", "progress"}
_START = f'{{"{WRITTEN_BY}": "{make_mark("plan").rstrip("0")}'.encode()
# Bytes of a plan: some millions of moves, of 300 each.
_SIZE_LIMIT = 1 << 30


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
    def from_dict(cls, line: Mapping[str, Any], where: str) -> Entry:
        """Reads what `to_dict` wrote.

        Raises:
            UnsupportedFormat: it is no such line.
        """
        names = [f.name for f in fields(PairOfBases)]
        pair = read_fields(PairOfBases, {name: line.get(name, "") for name in names}, where)
        rest = {key: value for key, value in line.items() if key not in names}
        return read_fields(cls, rest, where, pair=pair)

    def find_fault(self, bases: Mapping[str, PlannedBase]) -> str:
        """What is wrong with it in a plan of these bases; "" if nothing is."""
        labels = {self.pair.target} if self.refused else {self.pair.source, self.pair.target}
        unknown = sorted(labels - bases.keys())
        if unknown:
            return f"the plan has no base {unknown[0]!r:.80}"
        if not is_path_text(self.lora) or not os.path.isabs(self.lora):
            return f"{self.lora!r:.80} is not an absolute path of a LoRA"
        if not is_component(f"x{self.appended}"):
            return f"{self.appended!r:.80} cannot be part of a file's name"
        return "" if self.seconds >= 0 else "it takes less than no time"


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
    """What `prolora.migrate` does; save it, read it, choose among its entries.

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

    def __post_init__(self) -> None:
        """Refuses what would be read or written where nobody expects it.

        Raises:
            UnsupportedFormat: a label that cannot be a folder's name, an entry of an unknown base,
                or one whose LoRA or result could not have the name that it claims.
        """
        for label, base in self.bases.items():
            if not is_component(label):
                raise UnsupportedFormat(
                    f"the label {label!r:.80} of a base cannot be the name of a folder"
                )
            if not is_path_text(base.path):
                raise UnsupportedFormat(f"{base.path!r:.80} is not a path of a base")
        for number, entry in enumerate(self.entries, 1):
            if fault := entry.find_fault(self.bases):
                raise UnsupportedFormat(f"move {number}: {fault}")

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
        chosen = dict(self.options)
        resources["device"] = resources.get("device") or "cpu"  # many workers, and one card at most
        for name in _NOT_PLANNED & chosen.keys():
            raise InvalidOption(f"{name} is not an option of a plan")
        match = chosen.get("match", AUTO_MATCH)
        if match not in (AUTO_MATCH, "name", "similarity") and not _is_map(match):
            raise InvalidOption(f"match of a plan is a word or a map of modules, not {match!r:.80}")
        if chosen.get("method") == BEST:
            raise InvalidOption(MOVES_BY_WEIGHTS)
        return settle_options(DEFAULT_OPTIONS, chosen | resources, here=False).for_file()

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
        head = {
            WRITTEN_BY: make_mark("plan"),
            _KEY: FORMAT,
            "moves": len(self.entries),
            "version": __version__,
            "options": dict(self.options),
            "bases": {label: asdict(base) for label, base in self.bases.items()},
            "notes": dict(self.notes),
        }
        lines = map(json.dumps, (head, *(entry.to_dict() for entry in self.entries)))
        write_text_atomically(path, "".join(f"{line}\n" for line in lines))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan that `save` wrote, every byte of it.

        Raises:
            UnsupportedFormat: it cannot be read, is no plan, or was cut or changed.
        """
        where = os.fspath(path)
        content = _read_whole(path)
        head, *lines = content[:-1].split(b"\n")
        try:
            about = read_fields(_Head, parse_json_object(head, f"{where}, line 1"), where)
            if about.prolora_plan != FORMAT:
                raise UnsupportedFormat("is a plan of another version; make a plan again")
            bases = {
                label: read_fields(PlannedBase, base, f"{where}, line 1, base {label!r:.80}")
                for label, base in about.bases.items()
            }
            entries = [
                Entry.from_dict(parse_json_object(line, place), place)
                for place, line in ((f"{where}, line {i}", x) for i, x in enumerate(lines, 2))
            ]
            if len(entries) != about.moves:
                raise UnsupportedFormat(f"it has {len(entries)} of {about.moves} moves")
            return cls(entries, bases, about.options, about.notes)
        except UnsupportedFormat as error:
            text = str(error)
            raise UnsupportedFormat(text if where in text else f"{where}: {text}") from error


@dataclass(frozen=True)
class _Head:
    """Line 1 of a plan."""

    written_by: str
    prolora_plan: int
    moves: int
    version: str
    options: dict[str, Any]
    bases: dict[str, Any]
    notes: dict[str, Any]


def _is_map(match: object) -> bool:
    """Whether it is a mapping {target module: source module}."""
    return isinstance(match, Mapping) and all(
        isinstance(name, str) for pair in match.items() for name in pair
    )


def _read_whole(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a plan, which are those that its mark is of.

    Raises:
        UnsupportedFormat: they are others, or the file is no plan.
    """
    where = os.fspath(path)
    with open_regular(path, _SIZE_LIMIT) as file:
        try:
            content = file.read(len(_START))
            content += file.read() if content == _START else b""
        except OSError as error:
            raise input_error(path, error) from error
    if not content.startswith(_START):
        raise UnsupportedFormat(f"{where}: is not a plan of this version; make a plan again")
    if not is_signed(BytesIO(content), "plan"):
        raise UnsupportedFormat(
            f"{where}: was cut or changed since it was written and does not "
            "have the digest of its line 1. Make the plan again, or choose among its entries "
            "in Python and save that plan"
        )
    return content


def estimate_worker_memory(entries: Iterable[Entry]) -> int:
    """Estimated bytes of a process that moves LoRAs: itself, weights, and the LoRAs of a batch.

    Args:
        entries: of one pair of bases.
    """
    largest = max((entry.memory for entry in entries), default=0)
    together = max(largest, min(BATCH_LORAS * largest, BATCH_BYTES))
    return PROCESS_BYTES + 2 * STACK_BYTES + together


def select_shard(batches: Sequence[Batch], shard: tuple[int, int] | str | None) -> list[Batch]:
    """The batches of one shard: neighbours in the plan, of about the same time in every shard.

    Args:
        batches: of the whole plan.
        shard: (number from 1 on, how many), or a text such as "2/8"; None takes all.

    Raises:
        InvalidOption: there is no such shard.
    """
    if shard is None:
        return list(batches)
    try:
        parts = map(int, shard.split("/")) if isinstance(shard, str) else shard
        number, count = map(operator.index, parts)
    except (TypeError, ValueError):
        number, count = 0, 0
    if not 1 <= number <= count:
        raise InvalidOption(f"a shard is a number and a count, as 2/8 or (2, 8), not {shard!r}")
    costs = [sum(entry.seconds or 1.0 for entry in batch.entries) for batch in batches]
    total, before, chosen = sum(costs), 0.0, []
    for batch, cost in zip(batches, costs, strict=True):
        # A batch belongs where its middle lies.
        if min(count - 1, int((before + cost / 2) / total * count)) == number - 1:
            chosen.append(batch)
        before += cost
    return chosen


def make_label(name: str, taken: Iterable[str]) -> str:
    """A label for a base that a folder may have as its name.

    Args:
        name: of the base.
        taken: labels of other bases.
    """
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name or "base")
    plain = plain[:48].strip(".-") or "base"
    lower = {label.casefold() for label in taken}
    label, number = plain, 2
    while label.casefold() in lower:
        label, number = f"{plain}-{number}", number + 1
    return label
