"""The tables of blocks, where each came from, and of bands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .markup import Html, tag
from .module_tables import NOTHING, name_cell, number_cell, number_head, write_number, write_table

if TYPE_CHECKING:
    from ..report import Report


def write_decisions(report: Report) -> Html | None:
    """The source of each block of the target, where blocks were matched by their weights."""
    if not report.decisions:
        return None
    rows = [
        tag(
            "tr",
            name_cell(decision.target),
            tag("td", decision.source or NOTHING),
            tag("td", decision.runner_up or NOTHING),
            *map(
                number_cell,
                (
                    write_number(decision.score),
                    write_number(decision.runner_up_score),
                    write_number(decision.margin),
                ),
            ),
        )
        for decision in report.decisions
    ]
    numbers = map(number_head, ("score", "second", "margin"))
    heads = ["block", "from", "runner-up", *numbers]
    return write_table(heads, rows, "Where the blocks of the target came from")


def crossed_table(report: Report) -> Html | None:
    """What crossed between two latent spaces: a row for each band of the change."""
    crossed = report.probe.crossed if report.probe else None
    if crossed is None or not crossed.bands:
        return None
    rows = [
        tag(
            "tr",
            name_cell(band.name),
            number_cell(write_number(band.energy, ".0%")),
            number_cell(write_number(band.reached, ".0%")),
        )
        for band in crossed.bands
    ]
    heads = ["band", *map(number_head, ("of the wanted change", "reached"))]
    return write_table(heads, rows, "What crossed, on held-out probes")
