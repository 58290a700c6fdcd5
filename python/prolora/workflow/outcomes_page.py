"""Several LoRAs at once: a row for each, in a terminal and on a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from . import tables
from .outcome import Outcome
from .page.document import Page, Section, render_page
from .report import Report
from .table import NOTHING, Below, Cell, Column, Row, Table, Tone, make_table


def tabulate_outcomes(outcomes: Sequence[Outcome]) -> Table:
    """Tabulates what became of each LoRA."""
    counts = Counter(outcome.status for outcome in outcomes)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    columns = Column("LoRA"), Column("status"), *(Column(n, "d") for n in ("mapped", "skipped"))
    columns += Column("refused", "d"), Column("place", ".0%", has_bar=True)
    rows = [_describe_outcome(outcome, outcomes) for outcome in outcomes]
    title = f"{len(outcomes)} LoRAs: {summary}"
    return make_table(title, (*columns, Column("s", ".1f")), rows)


def name_outcome(outcome: Outcome, outcomes: Sequence[Outcome]) -> str:
    """Returns the LoRA's name, or its result's for one of two experts."""
    several = sum(other.lora == outcome.lora for other in outcomes) > 1
    return outcome.out.name if several else outcome.lora.name


def _describe_outcome(outcome: Outcome, outcomes: Sequence[Outcome]) -> Row:
    """Makes a row: the numbers, and on a page the map and sentences."""
    words, report = outcome.words, outcome.report
    name = f"{words.mark} {name_outcome(outcome, outcomes)}"
    if report is None:
        cells: list[Cell] = [None, None, None, outcome.share, None]
        tone: Tone = "warn" if outcome.error else "faint"
        below = Below(sentences=tuple(str(words).split("\n")))
        return Row((name, outcome.status, *cells), tone, below=below)
    totals = report.totals
    cells = [totals["mapped"], totals["skipped"], totals["refused"]]
    cells += [outcome.share, outcome.seconds or NOTHING]
    places = tables.map_modules(report.modules, report.dry_run)
    reasons = tables.tabulate_reasons(report.modules)
    sentences = (*str(words).split("\n"), *report.sentences())
    return Row((name, outcome.status, *cells), below=Below(places, sentences, reasons))


def render_outcomes(outcomes: Sequence[Outcome], facts: Mapping[str, str] | None = None) -> str:
    """Renders outcomes as one HTML file: one whole report, or several rows.

    `facts` say more of how they were made, by name: the command.
    """
    first, report = outcomes[0], outcomes[0].report
    if len(outcomes) == 1 and report is not None:
        known = {"LoRA": first.lora.name}  # without the folder, which is private
        if not first.planned:
            known["written to"] = first.out.name
        return report.to_html(known | dict(facts or {}))
    table = tabulate_outcomes(outcomes)
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    page = Page(
        title=table.title,
        eyebrow="LoRA transfer report",
        headline=table.title,
        sections=[Section("A row for each LoRA", [table], "index")],
        facts=_list_shared(reports) | dict(facts or {}),
    )
    return render_page(page)


def _list_shared(reports: Sequence[Report]) -> dict[str, str]:
    """Returns the facts that are the same for all."""
    facts = [report.facts() for report in reports]
    first = facts[0] if facts else {}
    return {name: text for name, text in first.items() if all(f.get(name) == text for f in facts)}
