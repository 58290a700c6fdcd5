"""What a notebook shows of a report: small, without script, in the notebook's own style."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .document import write_headline
from .drawing import draw_thumbnail
from .markup import join, tag
from .module_tables import stage_table, write_reasons
from .place_map import PlaceMap

if TYPE_CHECKING:
    from ..report import Report


def render_summary(report: Report) -> str:
    """The headline, the sentences, a small map, the model's parts, and what did not move."""
    places = PlaceMap(report.modules, report.dry_run)
    parts = [tag("p", tag("b", write_headline(report)))]
    parts.append(tag("ul", *(tag("li", sentence) for sentence in report.sentences())))
    if report.modules:
        parts.append(draw_thumbnail(places, "Share of each module's energy on the target", 640, 8))
    if report.rows("mapped") and not report.dry_run:
        parts.append(stage_table(report))
    reasons = write_reasons(report)
    return str(join(parts if reasons is None else [*parts, reasons]))
