"""What became of a collection: how much of it moved, by family and target; JSON and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...core.means import weighted_mean
from ...files.managed_folder import ManagedFolder
from ...version import __version__
from ..page.document import Page, Section, render_page
from ..table import Column, Row, Table, make_table
from .outcomes import Reason, gather_reasons, read_outcomes
from .plan import Plan
from .records import Record
from .result_folder import FAILED, MARKER, SUMMARY_JSON, SUMMARY_PAGE

# LoRAs that a reason on the page names.
_NAMED = 20
_UNKNOWN = "unknown"
STAYS_BEHIND = "part of the LoRA, of which updates could not be read"
"""Said of a LoRA that is on the target, but not all of it."""


@dataclass
class SummaryGroup:
    """LoRAs of one family that move from one base to another.

    Attributes:
        family: of the source base.
        source, target: labels of the bases.
        total, done, failed, refused, left: numbers of moves.
        incomplete: LoRAs among those done of which updates could not be read and stay behind.
        coverage: mean share of a LoRA's modules that moved; None where none is known.
        energy: mean share of a LoRA's energy that is on the target; None where none is known.
        methods: method -> number of results.
        verdicts: verdict on the pair -> number of LoRAs.
        seconds: time spent.
        bytes: size of the results.
    """

    family: str
    source: str
    target: str
    total: int = 0
    done: int = 0
    failed: int = 0
    refused: int = 0
    left: int = 0
    incomplete: int = 0
    coverage: float | None = None
    energy: float | None = None
    methods: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0

    @property
    def share(self) -> float:
        """The share that moved, 0 … 1."""
        return self.done / self.total if self.total else 0.0


@dataclass(frozen=True)
class Summary:
    """What became of a plan.

    Attributes:
        groups: one for each family, source and target.
        reasons: why moves failed or were refused -> how many, and their LoRAs; the most frequent
            comes first.
        plan: digest of the plan.
    """

    groups: tuple[SummaryGroup, ...]
    reasons: dict[str, Reason] = field(default_factory=dict)
    plan: str = ""

    def __repr__(self) -> str:
        """The headline."""
        return f"Summary({self.sentence()!r})"

    def count(self, state: str) -> int:
        """Moves that are "done", "failed", "refused" or "left", "incomplete", or the "total"."""
        return sum(getattr(group, state) for group in self.groups)

    def sentence(self) -> str:
        """The result in a sentence."""
        done, total = self.count("done"), self.count("total")
        share = f"{done / total:.1%}" if total else "nothing"
        rest = [
            f"{n} {state}" for state in ("failed", "refused", "left") if (n := self.count(state))
        ]
        return f"{share} of the collection moved: {', '.join([f'{done} of {total}', *rest])}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        states = ("total", "done", "failed", "refused", "left", "incomplete")
        return {
            "summary": self.sentence(),
            "totals": {state: self.count(state) for state in states},
            "groups": [asdict(group) | {"share": round(group.share, 4)} for group in self.groups],
            "reasons": {text: asdict(reason) for text, reason in self.reasons.items()},
            "plan": self.plan,
            "version": __version__,
        }

    def to_html(self) -> str:
        """One page that needs no other file and no network."""
        facts = {"digest of the plan": self.plan, "versions": f"prolora {__version__}"}
        tables = [_tabulate_groups(self.groups), _tabulate_reasons(self.reasons)]
        page = Page(
            title=self.sentence(),
            eyebrow="LoRA migration report",
            headline=self.sentence(),
            sections=[Section(table.title, [table]) for table in tables if table.rows],
            facts=facts,
        )
        return render_page(page)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes summary.json and summary.html into a folder.

        Raises:
            OutputError: they cannot be written, or are there and the folder is no migration's.
        """
        place = ManagedFolder(Path(os.path.abspath(folder)), MARKER)
        place.write_text(SUMMARY_JSON, json.dumps(self.to_dict(), indent=1) + "\n")
        place.write_text(SUMMARY_PAGE, self.to_html())


def summarise(plan: Plan, folder: str | os.PathLike[str]) -> Summary:
    """What became of a plan so far, from the folder alone.

    Args:
        plan: the plan.
        folder: of the results.
    """
    groups: dict[tuple[str, str, str], tuple[SummaryGroup, list[Record]]] = {}
    refused = []
    for entry, state, record in read_outcomes(plan, Path(folder)):
        base = plan.bases.get(entry.pair.source)
        family = (base.family if base else "") or _UNKNOWN
        name = family, entry.pair.source or _UNKNOWN, entry.pair.target
        group, records = groups.setdefault(name, (SummaryGroup(*name), []))
        group.total += 1
        setattr(group, state, getattr(group, state) + 1)
        if state in ("failed", "refused"):
            refused.append((entry, record.reason if record else entry.refused))
        if record is None:
            continue
        if state == "done" and record.unread:
            group.incomplete += 1
            refused.append((entry, STAYS_BEHIND))
        records.append(record)
        group.seconds += record.seconds
        group.bytes += record.size
        for table, word in ((group.methods, record.method), (group.verdicts, record.verdict)):
            if word:
                table[word] = table.get(word, 0) + 1
    for group, records in groups.values():
        group.coverage = _average(record.coverage for record in records)
        group.energy = _average(record.energy for record in records)
        group.seconds = round(group.seconds, 3)
    ordered = tuple(groups[name][0] for name in sorted(groups))
    return Summary(ordered, gather_reasons(refused), plan.digest)


def _average(values: Iterable[float | None]) -> float | None:
    mean = weighted_mean((1.0, value) for value in values)
    return None if mean is None else round(mean, 4)


def _tabulate_groups(groups: Sequence[SummaryGroup]) -> Table:
    counts = (Column(name, "d") for name in ("done", "of", "failed", "refused", "left"))
    columns = [Column("family"), Column("from"), Column("to"), Column("moved", ".0%", True)]
    columns += [*counts, Column("parts", ".0%"), Column("energy kept", ".0%")]
    rows = [
        Row(
            (
                *(group.family, group.source, group.target, group.share, group.done, group.total),
                *(group.failed, group.refused, group.left, group.coverage, group.energy),
                *(_list_counts(group.methods), _list_counts(group.verdicts)),
            )
        )
        for group in groups
    ]
    columns += [Column("method"), Column("verdict")]
    return make_table("By family and target", columns, rows)


def _list_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{word} {number}" for word, number in counts.items())


def _tabulate_reasons(reasons: dict[str, Reason]) -> Table:
    columns = Column("reason"), Column("moves", "d"), Column("LoRAs")
    rows = [
        Row((text, reason.count, ", ".join(_name_files(reason))))
        for text, reason in reasons.items()
    ]
    return make_table("What did not move", columns, rows)


def _name_files(reason: Reason) -> list[str]:
    more = len(reason.files) - _NAMED
    return reason.files[:_NAMED] + ([f"and {more} more; {FAILED} has all"] if more > 0 else [])
