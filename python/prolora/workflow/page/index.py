"""Several LoRAs on one page: a line and a small map for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .document import facts_section, kept_of_all, list_facts, make_page, render_report
from .drawing import draw_thumbnail
from .markup import Html, join, tag
from .module_tables import (
    NOTHING,
    number_cell,
    number_head,
    write_number,
    write_reasons,
    write_table,
)
from .place_map import PlaceMap

if TYPE_CHECKING:
    from ..report import Outcome, Report


def render_outcomes(outcomes: Sequence[Outcome], facts: Mapping[str, str] | None = None) -> str:
    """What became of LoRAs, as one HTML file: the whole report of one, a line for each of several.

    Args:
        outcomes: in the order of their lines.
        facts: more of how they were made, by what each is called: the command.
    """
    if len(outcomes) == 1 and outcomes[0].report is not None:
        outcome = outcomes[0]
        known = {"LoRA": outcome.lora.name}  # in which folder is nobody's business
        if not outcome.planned:
            known["written to"] = outcome.out.name
        return render_report(outcomes[0].report, known | dict(facts or {}))
    counts = Counter(outcome.status for outcome in outcomes)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    title = f"{len(outcomes)} LoRAs: {summary}"
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    head = tag("header", tag("p", "LoRA transfer report", class_="eyebrow"), tag("h1", title))
    section = tag("section", _outcomes_table(outcomes), class_="index")
    shared = _list_shared(reports) | dict(facts or {})
    return make_page(title, join([head, tag("main", section, facts_section(shared))]))


def _list_shared(reports: Sequence[Report]) -> dict[str, str]:
    """The facts that are the same for all."""
    facts = [list_facts(report) for report in reports]
    first = facts[0] if facts else {}
    return {name: text for name, text in first.items() if all(f.get(name) == text for f in facts)}


def _outcomes_table(outcomes: Sequence[Outcome]) -> Html:
    rows = [_describe_outcome(outcome, outcomes) for outcome in outcomes]
    numbers = map(number_head, ("modules moved", "energy kept", "vs copy", "seconds"))
    heads = ["LoRA", "status", *numbers]
    return write_table(heads, rows, "A line for each LoRA")


def _describe_outcome(outcome: Outcome, outcomes: Sequence[Outcome]) -> Html:
    """A line: the numbers, the map, and what to read about it below its name."""
    several = sum(other.lora == outcome.lora for other in outcomes) > 1
    name = outcome.out.name if several else outcome.lora.name
    report = outcome.report
    status = tag("td", outcome.status, class_="warn" if outcome.error else None)
    if report is None:
        why = tag("div", str(outcome.error)) if outcome.error else ""
        dashes = [number_cell(NOTHING)] * 4
        return tag("tr", tag("th", name, why, scope="row"), status, *dashes)
    share, totals = kept_of_all(report), report.totals
    sentences = tag("ul", *(tag("li", sentence) for sentence in report.sentences()))
    details = tag("details", tag("summary", "more"), sentences, write_reasons(report) or "")
    label = f"Heat map of {name}: the share of each module's energy that was kept"
    return tag(
        "tr",
        tag(
            "th",
            name,
            draw_thumbnail(PlaceMap(report.modules, report.dry_run), label),
            details,
            scope="row",
        ),
        status,
        number_cell(f"{report.coverage:.0%}"),
        number_cell(write_number(share, ".0%")),
        number_cell(write_number(totals["copy_distance"])),
        number_cell(write_number(outcome.seconds, ".1f") if outcome.seconds else NOTHING),
    )
